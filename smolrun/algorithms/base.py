"""What every algorithm is: a few verbs around one step, of which it overrides those that make it
itself.

    train_step(micro_batches)
        forward_backward    this rank's gradient of the sum of losses over its samples
        synchronize         starts to combine the gradients of all ranks; never blocks
        update              when that is done: divide by the number of targets, clip, step

With staleness K an update uses the gradient of K steps ago: a step starts its own synchronization
and finishes the one that was started K steps earlier, so the network has K steps of compute to hide
behind. Sums of gradients and numbers of targets are reduced, and divided once, so all samples weigh
the same whichever rank has them.

Ranks exchange their statistics, agree to stop, and share buffers at the steps for which
`is_sync_step` holds, by default at every one; between two of these the base calls no collective.

Knows nothing of where data comes from, of files, or of configs.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smolrun.algorithms.contract import (
    FORWARD,
    STEP_STATS,
    UPDATE,
    BatchAssignment,
    Context,
    EvalSums,
    PendingUpdate,
    StepResult,
    StepStats,
    check_answer,
)
from smolrun.algorithms.experts import ExpertLoad, expert_columns, with_auxiliary_loss
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice, Writer
from smolrun.collectives.api import new_group
from smolrun.data.splits import IGNORE_INDEX, Batch
from smolrun.errors import CheckpointError, ConfigError
from smolrun.mesh.mesh import Work
from smolrun.parts.norms import squared_norm
from smolrun.parts.optimizer_state import expected_bytes, init_optimizer_state, optimizer_state
from smolrun.parts.placement import DataCoordinates
from smolrun.parts.replicas import (
    Contents,
    broadcast_from,
    contents,
    model_tensors,
    persistent_buffers,
)
from smolrun.parts.step_clock import StepClock

_COMPARED_STEPS = 3  # at first, in which the bytes of buffers are compared

__all__ = ["Algorithm", "BatchAssignment", "Context", "EvalSums", "PendingUpdate", "StepResult"]


class Algorithm(ABC):
    """One way to distribute training. `place` first, then `train_step` again and again, then
    `drain`. One thread calls it."""

    runs_empty_batches = False  # a forward is collective, so a rank without samples runs it too
    needs_full_model = True  # otherwise `place` gets a model whose parameters only have shapes
    can_evaluate = True  # whether this rank takes part in evaluations
    evaluates_locally = False  # whether this rank evaluates without the others
    has_checkpoint_state = True  # whether this rank writes a part of a checkpoint
    is_lockstep = True  # whether all ranks begin every step together
    replicas_may_differ = False  # in last bits: unlike machines, each updating its own replica
    # The index within the group of the rank whose `forward` returns logits; None: all ranks' do.
    logits_index: int | None = None
    note = ""  # what `place` has decided that the user should know
    # More words of the seed of a forward: ranks that share samples may draw differently.
    seed_words: tuple[int, ...] = ()

    def __init__(self, context: Context) -> None:
        self.context = context
        self.collectives = new_group(context.mesh)
        self.replica_group = self.collectives  # the ranks that hold the same parameters
        self.clock = StepClock(context.pace)
        self.loss_scale = context.precision.loss_scale(context.expected_weight)
        self.expert_load = ExpertLoad()
        # Set by this rank's trainer; all ranks know after the next step at which they meet.
        self.wants_stop = False
        self.steps_begun = 0
        self.pending_updates: deque[PendingUpdate] = deque()  # oldest first
        self._norms: dict[str, dict[str, float]] | None = None
        self._changed_buffer = ""  # by a forward of this rank
        self._steps_compared = 0
        self.buffers_change = False  # by a forward of any rank; equal on all, and saved

    # -- what a trainer calls ----

    def place(self, model: nn.Module) -> None:
        """Takes the model, keeps what this rank holds, and builds the optimizer for that."""
        self.model = model
        named = model.named_parameters()
        self.optimized_params = [own for own in named if self.writer(own[0]) != "other"]
        self.optimizer = self.context.make_optimizer(self.optimized_params)

    @functools.cached_property
    def step_stats(self) -> tuple[str, ...]:
        """What `synchronize` reports of every step, of the model that `place` was given."""
        return (*STEP_STATS, *expert_columns(self.model))

    def start_barrier(self) -> None:
        """Blocks until all ranks are ready to train; called once, after `place` and `restore`."""
        self.collectives.barrier()

    def data_coordinates(self, speeds: Sequence[float]) -> DataCoordinates:
        """Which part of every global batch this rank reads, where `speeds` are those of the
        ranks. By default every rank its own, in proportion to its speed."""
        return DataCoordinates(self.context.mesh.rank, speeds)

    def is_sync_step(self, step: int) -> bool:
        """Whether ranks meet at this step: they exchange statistics, agree to stop, share buffers.
        The same on all ranks."""
        return True

    def next_assignment(self, steps: int) -> BatchAssignment | None:
        """What to train on next, in a run of so many `steps`; None: nothing more."""
        return BatchAssignment(self.steps_begun) if self.steps_begun < steps else None

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult | None:
        """One step; returns the update it finished, None for the first K steps."""
        self.context.mesh.progress = self.steps_begun
        with self.clock.compute():
            stats = self.watched_forward_backward(micro_batches)
        stats = self.expert_load.take(self.step_stats[len(STEP_STATS) :]) | stats
        stats["samples"] = sum(len(batch.inputs) for batch in micro_batches)
        stats["changed_buffer"] = float(bool(self._changed_buffer))
        stats["compute_s"] = self.clock.compute_s
        stats["wants_stop"] = float(self.wants_stop)
        with self.clock.span("synchronize"):
            self.pending_updates.append(self.synchronize(stats))
        self.steps_begun += 1
        return self._update_oldest() if len(self.pending_updates) > self.context.staleness else None

    def drain(self) -> list[StepResult]:
        """Finishes the pending updates."""
        return [self._update_oldest() for _ in range(len(self.pending_updates))]

    def finish(self) -> None:
        """The last call: blocks until no rank needs another one any more."""
        self.wait_for_transfers()
        self.collectives.barrier()

    def wait_for_transfers(self) -> None:
        """Blocks until nothing that an update has sent or asked for is on its way."""

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalSums:
        """Sums over the samples of all ranks that evaluate; changes nothing. Collective."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        is_classes = all(batch.targets.ndim == 1 for batch in micro_batches)
        for batch in micro_batches:
            logits = self.forward(batch) if len(batch.inputs) or self.runs_empty_batches else None
            if logits is not None:
                sums[0] += self.context.loss_sum(logits, batch.targets).item()
                sums[1] += int((batch.targets != IGNORE_INDEX).sum())
                if is_classes:
                    sums[2] += int((logits.argmax(-1).cpu() == batch.targets.cpu()).sum())
        self.model.train()
        if not self.evaluates_locally:
            self.collectives.all_reduce(sums)
        loss, weight, correct = sums.tolist()
        return EvalSums(loss, int(weight), int(correct) if is_classes else None)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """The model's output for a batch of token ids, in float32 on the CPU, on every rank;
        collective."""
        self.model.eval()
        found = self.forward(Batch(tokens, torch.full_like(tokens, IGNORE_INDEX)))
        self.model.train()
        output = torch.empty(0) if found is None else found.float().cpu().contiguous()
        if self.logits_index is None:
            return output
        width = torch.tensor(output.shape[-1])
        self.collectives.broadcast(width, self.logits_index)
        output = output if found is not None else torch.empty((*tokens.shape, int(width)))
        self.collectives.broadcast(output, self.logits_index)
        return output

    def replica_tensors(self) -> dict[str, Tensor]:
        """What must be equal on all ranks after every update, by name, for the replica check; empty
        where nothing is replicated."""
        return {}

    # -- what an algorithm overrides ----

    def forward(self, batch: Batch) -> Tensor | None:
        """The logits of a batch on this rank's device, in float32 at least; None on a rank that
        does not hold the last stage of the model."""
        return self.checked_logits(self.model, batch)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Adds the gradient of the sum of losses to every `parameter.grad`; returns `loss_sum` and
        `num_targets`, and what else `step_stats` names."""
        losses, num_targets = [], 0
        for index, batch in enumerate(micro_batches):
            if index == len(micro_batches) - 1:
                self.before_last_backward()
            logits = self.forward(batch) if len(batch.inputs) or self.runs_empty_batches else None
            if logits is not None:
                loss = self.context.loss_sum(logits, batch.targets)
                (loss * self.loss_scale.value).backward()
                losses.append(loss.detach())
                num_targets += int((batch.targets != IGNORE_INDEX).sum())
        return {"loss_sum": sum(loss.item() for loss in losses), "num_targets": num_targets}

    def before_last_backward(self) -> None:
        """Called before the last micro-batch: gradients complete from now on may be sent."""

    @abstractmethod
    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """Starts to combine this step's gradients of all ranks, and their `stats` by `share_stats`;
        never blocks. Adds `is_finite` to the stats."""

    def wait_for(self, pending: PendingUpdate) -> None:
        """Blocks until all works of a pending update are done; then it does nothing."""
        for work in pending.works:
            self.clock.wait(work)

    @abstractmethod
    def bind_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """Puts the summed gradients of an update whose works are done into `parameter.grad`;
        returns the distinct tensors that hold them."""

    def pending_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """The summed gradients of an update whose works are done, one per trained parameter in the
        model's order: memory that a checkpoint is written from and read into. An algorithm that
        allows staleness must have it."""
        raise NotImplementedError(f"{type(self).__name__} cannot save gradients in flight")

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """Divides the sums by `weight`, clips, steps; returns the norm of the mean gradient, None
        if the update was skipped. Where ranks share gradients all see the same norm, so all take
        the same decision."""
        gradients = self.bind_gradients(pending)
        norm = math.sqrt(self.norm_squared(gradients)) / weight if weight else math.nan
        self._norms = None
        if not math.isfinite(norm):
            return None
        clip = self.context.grad_clip
        clip_coef = clip / norm if 0 < clip < norm else 1.0
        for gradient in gradients:
            gradient.mul_(clip_coef / weight)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        measured = self.context.norms.begin(pending.step, self.measured_params(), clip_coef)
        self.optimizer.step()
        self._norms = self.whole_norms(measured.finish()) if measured else None
        return norm

    def norm_squared(self, gradients: list[Tensor]) -> float:
        """Squared norm of the whole gradient; where ranks hold parts, an override adds them up."""
        return squared_norm(gradients)

    def measured_params(self) -> list[tuple[str, nn.Parameter]]:
        """Those whose norms this rank takes."""
        return self.optimized_params

    def whole_norms(self, norms: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Norms by layer; where ranks step parts of the model, an override joins them."""
        return norms

    # -- what a checkpoint holds ----

    def owned(self) -> Iterator[TensorSlice]:
        """What this rank holds of a checkpoint, in memory that the next step changes:

        model/<name>                 parameters and buffers
        optimizer/<state>/<name>     the optimizer's state of each parameter
        in_flight/<n>/<name>         summed gradients that no update has used yet, oldest first
        in_flight/<n>/facts          and the statistics that came with them

        Keys are names, never ranks or positions, so that another number of ranks can resume."""
        for pending in self.pending_updates:
            self.wait_for(pending)
        yield from chain(self.model_slices(), self.optimizer_slices(), self.pending_slices())
        for number, pending in enumerate(self.pending_updates):
            yield TensorSlice.whole(f"in_flight/{number}/facts", pending.stats.table)

    def model_slices(self) -> Iterator[TensorSlice]:
        """This rank's part of every parameter and buffer. Of those of which it has none too, as
        slices without elements: a checkpoint is checked against them."""
        for name, tensor in model_tensors(self.model):
            yield TensorSlice.whole(f"model/{name}", tensor, self.writer(name))

    def optimizer_slices(self) -> Iterator[TensorSlice]:
        """This rank's part of the optimizer's state; none before the first update."""
        for path, tensor in optimizer_state(self.optimizer, self.optimized_params).items():
            yield self.optimizer_slice(f"optimizer/{path}", path.partition("/")[2], tensor)

    def optimizer_slice(self, key: str, name: str, values: Tensor) -> TensorSlice:
        """One of them, of parameter `name`."""
        return TensorSlice.whole(key, values, self.writer(name))

    def pending_slices(self) -> Iterator[TensorSlice]:
        """This rank's part of the gradients of pending updates."""
        names = [name for name, p in self.optimized_params if p.requires_grad]
        for number, pending in enumerate(self.pending_updates):
            for name, gradient in zip(names, self.pending_gradients(pending), strict=True):
                key = f"in_flight/{number}/{name}"
                yield TensorSlice.whole(key, gradient, self.writer(name))

    def writer(self, name: str) -> Writer:
        """Who writes a parameter or buffer that is whole here, and what belongs to it."""
        return "any"

    def is_on_other_rank(self, name: str) -> bool:
        """Whether only other ranks step this parameter."""
        return False

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters in the shape and dtype in which they are saved; perhaps without values."""
        yield from self.model.parameters()

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint will be, all ranks together."""
        parameters = list(self.whole_parameters())
        held = sum(own.nbytes for own in (*parameters, *persistent_buffers(self.model).values()))
        late = self.context.staleness * sum(p.nbytes for p in parameters if p.requires_grad)
        return held + late + expected_bytes(self.optimizer, parameters)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, as JSON; equal on all ranks."""
        return {
            "steps_begun": self.steps_begun,
            "in_flight": [pending.step for pending in self.pending_updates],
            "step_stats": list(self.step_stats),
            "loss_scale": self.loss_scale.state(),
            "buffers_change": self.buffers_change,
        }

    @torch.no_grad()
    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """Resumes where `checkpoint` was made, by any algorithm on any number of ranks;
        CheckpointError for one of another model or optimizer."""
        checkpoint.load(self.model_slices(), all_of="model/")
        self.restore_progress(checkpoint, state)
        dtypes = {
            path: dtype
            for path, dtype in checkpoint.dtypes("optimizer/").items()
            if not self.is_on_other_rank(path.partition("/")[2])
        }
        init_optimizer_state(self.optimizer, self.optimized_params, dtypes)
        checkpoint.load(chain(self.optimizer_slices(), self.pending_slices()))

    @torch.no_grad()
    def load_weights(self, checkpoint: CheckpointReader) -> None:
        """Begins a new run with the weights of `checkpoint`, averaged ones where it has them, of
        any algorithm and dtype; CheckpointError for one of another model."""
        checkpoint.load_weights(self.model_slices())

    def restore_progress(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """Restores numbers, and pending updates as far as their gradients can be loaded."""
        self.loss_scale.restore(state["loss_scale"])
        self.steps_begun = state["steps_begun"]
        self.buffers_change = state.get("buffers_change", False)  # older checkpoints: not known
        # Fewer is right too: a run that came to its end has applied them all.
        if len(state["in_flight"]) > self.context.staleness:
            raise CheckpointError(
                f"{checkpoint.folder} has {len(state['in_flight'])} gradients in flight, more than "
                f"staleness.bound = {self.context.staleness}; resume with the bound that it had"
            )
        for number, step in enumerate(state["in_flight"]):
            table = checkpoint.read(f"in_flight/{number}/facts")
            saved = StepStats.saved(table, state.get("step_stats"))
            stats = saved.resumed(self.step_stats, self.collectives.ranks)
            self.pending_updates.append(PendingUpdate(step, stats, []))

    # -- shared by all ----

    def share_stats(self, stats: Mapping[str, float]) -> tuple[StepStats, list[Work]]:
        """Starts to gather the statistics of all ranks, at a step at which they meet; else own."""
        own = StepStats.of_rank(self.context.mesh.rank, {n: stats[n] for n in self.step_stats})
        if not self.is_sync_step(self.steps_begun):
            return own, []
        table = own.table.new_zeros((self.collectives.size, len(self.step_stats)))
        work = self.collectives.all_gather(table, own.table[0], async_op=True)
        return StepStats(self.step_stats, self.collectives.ranks, table), [work]

    def all_ranks(self, own: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        self.clock.wait(self.collectives.all_reduce(own, async_op=True))
        return own

    def checked_logits(self, model: Callable[[Tensor], Any], batch: Batch) -> Tensor:
        """What a model, or its last stage, returns for a batch, in float32 at least. ConfigError or
        DataError where it does not fit the targets."""
        logits = self.output_of(model, batch)
        check_answer(logits, batch, self.context.num_outputs)
        found: Tensor = logits if logits.dtype == torch.float64 else logits.float()
        return found

    def output_of(self, model: Callable[[Tensor], Any], batch: Batch) -> Any:
        """What a model, or a stage of it, returns for a batch, unchecked."""
        self.context.reseed(FORWARD, batch.position, *self.seed_words)
        with self.context.precision.context(self.context.device):
            output = model(self.to_device(batch.inputs))
        self.expert_load.add(model)
        return with_auxiliary_loss(output, model, batch.targets, self.loss_scale.value)

    def to_device(self, inputs: Tensor) -> Tensor:
        """Inputs where the model is; numbers (not token ids) in the model's own dtype."""
        dtype = self.context.precision.parameters if inputs.is_floating_point() else inputs.dtype
        return inputs.to(device=self.context.device, dtype=dtype)

    def watched_forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """`forward_backward`; and it notes whether one has ever changed a buffer that is saved
        (running statistics). ConfigError where the ranks could not share it."""
        is_watched = not self._changed_buffer and any(len(batch.inputs) for batch in micro_batches)
        # Not for ever: masks and frozen weights may be large.
        by_bytes = self._steps_compared < _COMPARED_STEPS
        buffers = persistent_buffers(self.model) if is_watched else {}
        before = contents(buffers, by_bytes=by_bytes)
        with self.clock.span("forward_backward"):
            stats = self.forward_backward(micro_batches)
        if is_watched:
            self._steps_compared += 1
            self._note_changes(before, contents(persistent_buffers(self.model), by_bytes=by_bytes))
        return stats

    def try_out(self, batch: Batch) -> None:
        """Runs the model once, as in training, and changes nothing. Raises what the first batch
        would raise: for a server whose workers are restarted when they fail."""
        before = persistent_buffers(self.model)
        # functional_call leaves the changed ones here.
        copies = {name: buffer.detach().clone() for name, buffer in before.items()}
        self.checked_logits(lambda inputs: functional_call(self.model, copies, (inputs,)), batch)
        after = {**persistent_buffers(self.model), **copies}
        self._note_changes(contents(before, by_bytes=True), contents(after, by_bytes=True))

    def _note_changes(self, before: Mapping[str, Contents], after: Mapping[str, Contents]) -> None:
        for name in (*before, *after):
            if not (name in before and name in after and before[name].layout == after[name].layout):
                raise ConfigError(
                    f"the model's forward made, removed or reshaped its buffer {name!r}, so no "
                    "checkpoint would fit the model: register it in the constructor, of the shape "
                    "and type that it keeps, or with persistent=False"
                )
        self._changed_buffer = next((name for name in after if after[name] != before[name]), "")
        if self._changed_buffer and not self.is_lockstep and self.context.mesh.world_size > 1:
            raise ConfigError(
                f"the model's forward changes its buffer {self._changed_buffer!r}, which ranks can "
                "share only where they make every update together, unlike with algorithm=edp or "
                "algorithm.straggler_timeout_s: take algorithm=classicdp, algorithm=fsdp or "
                "algorithm=syncps (algorithm.straggler_timeout_s=0), or norms without running "
                "statistics (LayerNorm, GroupNorm)"
            )

    def _share_buffers(self, stats: StepStats) -> None:
        """Where forward changes buffers, all ranks take those of the first rank that has trained,
        after every update: as DDP does before every forward. So an evaluation is that of the model
        that is saved, and nothing depends on when a run evaluates or saves. A mean would."""
        self.buffers_change |= any(stats.column("changed_buffer"))
        if self.collectives.size > 1 and self.buffers_change and self.is_lockstep:
            samples = stats.column("samples")
            first = next((index for index, count in enumerate(samples) if count), 0)
            buffers = list(persistent_buffers(self.model).values())
            broadcast_from(self.collectives, first, buffers, wait=self.clock.wait)

    def _update_oldest(self) -> StepResult:
        pending = self.pending_updates.popleft()
        self.wait_for(pending)
        stats, weight = pending.stats, pending.stats.total("num_targets")
        learning_rate = self.context.learning_rate(pending.step)
        self.context.reseed(UPDATE, pending.step)
        with self.clock.compute(), self.clock.span("update"):
            grad_norm = self.update(pending, weight, learning_rate)
        self.loss_scale.update(was_finite=grad_norm is not None)
        is_shared = self.is_sync_step(pending.step)
        if is_shared:
            self._share_buffers(stats)
        slowest, (compute_s, wait_s) = stats.slowest, self.clock.take()
        has_waited = slowest != self.context.mesh.rank and wait_s > 0.05 * compute_s
        return pending.result(
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            compute_s=compute_s,
            wait_s=wait_s,
            waited_for=slowest if has_waited else None,
            wants_stop=is_shared and any(stats.column("wants_stop")),
            norms=self._norms,
        )
