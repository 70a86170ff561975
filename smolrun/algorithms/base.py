"""What every algorithm is: one template, a few verbs, and it overrides only those that make it
itself.

    train_step(micro_batches)
        forward_backward    this rank's gradient of the sum of losses over its samples
        synchronize         start to bring the gradients of all ranks together
        update              when that is done: divide by the sum of weights, clip, step

With staleness K an update uses the gradient of K steps ago: the step starts its own synchronization
and finishes the one that was started K steps earlier, so the network has K steps of compute to hide
behind. The weight of a sample is the number of its targets: sums of gradients and sums of weights
are reduced, and divided once.

Knows nothing of where data comes from, of files, or of configs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from smolrun.algorithms import saved
from smolrun.algorithms.contract import (
    FACTS,
    BatchAssignment,
    Context,
    EvalSums,
    PendingUpdate,
    StepResult,
    check_answer,
    loss_sum,
)
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.collectives.api import new_group
from smolrun.data.splits import IGNORE_INDEX, Batch
from smolrun.errors import ConfigError
from smolrun.mesh.mesh import Work
from smolrun.parts.norms import squared_norm
from smolrun.parts.replicas import Contents, contents, copy_from, persistent_buffers
from smolrun.parts.step_clock import StepClock

# What random numbers are drawn for: the first word of their seed. What a forward draws follows from
# its samples, so ranks differ and resuming needs no state; what an update draws is equal on all
# ranks, so replicas stay equal.
FORWARD, UPDATE = 0, 1

_COMPARED_STEPS = 3  # at first, in which the bytes of buffers are compared

__all__ = ["Algorithm", "Context", "EvalSums", "PendingUpdate", "BatchAssignment", "StepResult"]


class Algorithm(ABC):
    """One way to distribute training. `place` first, then `train_step` again and again, then
    `drain`."""

    # Whether every rank holds the model; otherwise `place` is content with a shell of it.
    needs_full_model = True
    # Whether this rank takes part in evaluations and checkpoints; whether all ranks begin every
    # step together; whether this rank evaluates by itself.
    can_evaluate = has_checkpoint_state = is_lockstep = True
    evaluates_locally = False
    replicas_may_differ = False  # in last bits: unlike machines, each updating its own replica

    def __init__(self, context: Context) -> None:
        self.context = context
        self.collectives = new_group(context.mesh)
        # Set by this rank's trainer; all ranks learn of it with the next step.
        self.wants_stop = False
        self.steps_begun = 0
        self.pending_updates: deque[PendingUpdate] = deque()
        self.clock = StepClock(context.pace)
        self._norms: dict[str, dict[str, float]] | None = None
        self._changed_buffer = ""  # by a forward of this rank
        self._steps_compared = 0
        self.buffers_change = False  # by a forward of any rank; equal on all, and saved

    # -- what a trainer calls ----

    def place(self, model: torch.nn.Module) -> None:
        """Takes the model, keeps what this rank holds, and builds the optimizer for that."""
        self.model = model
        self.stepped = list(model.named_parameters())
        self.optimizer = self.context.make_optimizer(self.stepped)
        self.loss_scale = self.context.precision.loss_scale(self.context.expected_weight)

    def start_barrier(self) -> None:
        """Waits until all ranks are ready to train; called once, after `place` and `restore`."""
        self.collectives.barrier()

    def batch_weights(self, speeds: Sequence[float]) -> Sequence[float]:
        """How much of a global batch each rank gets, relative to the others."""
        return speeds

    def next_assignment(self, steps: int) -> BatchAssignment | None:
        """What to train on next, where there are so many `steps`; None: nothing more."""
        return BatchAssignment(self.steps_begun) if self.steps_begun < steps else None

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult | None:
        """One step; returns the update it finished, None while the first K are in flight."""
        self.context.mesh.progress = self.steps_begun
        with self.clock.compute():
            facts = self.watched_forward_backward(micro_batches)
        facts["samples"] = sum(len(batch.inputs) for batch in micro_batches)
        facts["changed_buffer"] = float(bool(self._changed_buffer))
        facts["compute_s"] = self.clock.compute_s
        facts["wants_stop"] = float(self.wants_stop)
        with self.clock.span("synchronize"):
            self.pending_updates.append(self.synchronize(facts))
        self.steps_begun += 1
        return self._update_oldest() if len(self.pending_updates) > self.context.staleness else None

    def drain(self) -> list[StepResult]:
        """Finishes the updates that are still in flight."""
        return [self._update_oldest() for _ in range(len(self.pending_updates))]

    def finish(self) -> None:
        """The last call: nobody leaves while another still needs it."""
        self.collectives.barrier()

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalSums:
        """Sums over the samples of all ranks that evaluate; changes nothing."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        is_classes = all(batch.targets.ndim == 1 for batch in micro_batches)
        for batch in micro_batches:
            if len(batch.inputs):
                logits, targets = self._answer(batch)
                sums[0] += loss_sum(logits, targets).item()
                sums[1] += int((targets != IGNORE_INDEX).sum())
                if is_classes:
                    sums[2] += int((logits.argmax(-1) == targets).sum())
        self.model.train()
        if not self.evaluates_locally:
            self.collectives.all_reduce(sums)
        loss, weight, correct = sums.tolist()
        return EvalSums(loss, int(weight), int(correct) if is_classes else None)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """The model's output for a batch, on every rank; collective."""
        self.model.eval()
        with self.context.precision.context(self.context.device):
            output: Tensor = self.model(self._to_device(tokens))
        self.model.train()
        return output.float().cpu()

    def replica_tensors(self) -> dict[str, Tensor]:
        """What must be equal on all ranks after every update, by name, for the replica check; empty
        where nothing is replicated."""
        return {}

    def pieces(self) -> list[TensorSlice]:
        """What this rank writes into a checkpoint; all ranks' pieces together are the whole. The
        tensors are the living ones: copy them before the next step."""
        for pending in self.pending_updates:
            self.wait_for(pending)
        return saved.dealt(saved.tensors(self), self.collectives.size, self.collectives.index)

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint will be, all ranks together."""
        return saved.expected_bytes(self)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, as JSON; equal on all ranks."""
        return saved.state(self)

    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """Goes on where `checkpoint` was made; CheckpointError for one of another model."""
        saved.restore(self, checkpoint, state)

    # -- what an algorithm overrides ----

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Adds the gradient of the sum of losses to every `parameter.grad`; returns facts."""
        losses, weight = [], 0
        for index, batch in enumerate(micro_batches):
            if index == len(micro_batches) - 1:
                self.before_last_backward()
            if len(batch.inputs):
                loss = loss_sum(*self._answer(batch))
                (loss * self.loss_scale.value).backward()
                losses.append(loss.detach())
                weight += int((batch.targets != IGNORE_INDEX).sum())
        return {"loss_sum": sum(loss.item() for loss in losses), "weight": weight}

    def before_last_backward(self) -> None:
        """Called before the last micro-batch: gradients complete from now on may leave."""

    @abstractmethod
    def synchronize(self, facts: dict[str, float]) -> PendingUpdate:
        """Starts to bring this step's gradients and facts of all ranks together; never waits."""

    def wait_for(self, pending: PendingUpdate) -> None:
        """Waits until all that belongs to the pending is here; the second time it is a no-op."""
        for work in pending.works:
            self.clock.wait(work)

    @abstractmethod
    def bind_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """Puts the summed gradients of a finished pending into `parameter.grad`; returns the
        distinct tensors that hold them."""

    def pending_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """The summed gradients of a pending whose works are done, one per parameter that is
        trained, in the model's order; for checkpoints, which read them and write into them.

        Whoever allows staleness must have it."""
        raise NotImplementedError(f"{type(self).__name__} cannot save gradients in flight")

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """Divides the sums by `weight`, clips, steps; returns the norm of the mean gradient, None
        if the update was skipped. All ranks see the same norm, so all take the same decision."""
        gradients = self.bind_gradients(pending)
        norm = math.sqrt(self.norm_squared(gradients)) / weight if weight else math.nan
        self._norms = None
        if not math.isfinite(norm):
            return None
        clip = self.context.grad_clip
        shrunk = clip / norm if 0 < clip < norm else 1.0
        for gradient in gradients:
            gradient.mul_(shrunk / weight)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        measured = self.context.norms.begin(pending.step, self.stepped, shrunk)
        self.optimizer.step()
        self._norms = self.whole_norms(measured.finish()) if measured else None
        return norm

    def norm_squared(self, gradients: list[Tensor]) -> float:
        """Squared norm of the whole gradient; where ranks hold parts, an override adds them up."""
        return squared_norm(gradients)

    def whole_norms(self, norms: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Norms by layer; where ranks step parts of the model, an override joins them."""
        return norms

    # -- shared by all ----

    def share_facts(self, facts: dict[str, float]) -> tuple[Tensor, Work]:
        """Starts to tell all ranks this rank's facts."""
        table = torch.zeros((self.collectives.size, len(FACTS)), dtype=torch.float64)
        row = torch.tensor([facts[name] for name in FACTS], dtype=torch.float64)
        return table, self.collectives.all_gather(table, row, async_op=True)

    def watched_forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """`forward_backward`; and it notes whether one has ever changed a buffer that is saved
        (running statistics). ConfigError where the ranks could not share it."""
        if self._changed_buffer or not any(len(batch.inputs) for batch in micro_batches):
            return self._timed_forward_backward(micro_batches)
        # Not for ever: masks and frozen weights may be large.
        by_bytes = self._steps_compared < _COMPARED_STEPS
        self._steps_compared += 1
        buffers = persistent_buffers(self.model)
        before = contents(buffers, by_bytes=by_bytes)
        facts = self._timed_forward_backward(micro_batches)
        self._note_changes(before, contents(persistent_buffers(self.model), by_bytes=by_bytes))
        return facts

    def _timed_forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        with self.clock.span("forward_backward"):
            return self.forward_backward(micro_batches)

    def try_out(self, batch: Batch) -> None:
        """Runs the model once, as in training, and changes nothing. Raises what the first batch
        would raise: for a rank whose workers are started again and again when they fail."""
        before = persistent_buffers(self.model)
        # functional_call leaves the changed ones here.
        copies = {name: buffer.detach().clone() for name, buffer in before.items()}
        self._answer(batch, lambda inputs: functional_call(self.model, copies, (inputs,)))
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

    def _share_buffers(self, facts: Mapping[str, Sequence[float]]) -> None:
        """Where forward changes buffers, all ranks take those of the first rank that has trained,
        after every update: as DDP does before every forward. So an evaluation is that of the model
        that is saved, and nothing depends on when a run evaluates or saves. A mean would."""
        self.buffers_change |= any(facts["changed_buffer"])
        if self.collectives.size > 1 and self.buffers_change and self.is_lockstep:
            first = next((rank for rank, count in enumerate(facts["samples"]) if count), 0)
            buffers = list(persistent_buffers(self.model).values())
            copy_from(self.collectives, first, buffers, wait=self.clock.wait)

    def _to_device(self, inputs: Tensor) -> Tensor:
        """Inputs where the model is; numbers (not token ids) in the model's own format."""
        dtype = self.context.precision.parameters if inputs.is_floating_point() else inputs.dtype
        return inputs.to(device=self.context.device, dtype=dtype)

    def _answer(
        self, batch: Batch, forward: Callable[[Tensor], Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits, in float32 at least, and targets, both on the device."""
        device = self.context.device
        self.context.reseed(FORWARD, batch.position)
        with self.context.precision.context(device):
            logits = (forward or self.model)(self._to_device(batch.inputs))
        check_answer(logits, batch, self.context.num_outputs)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits, batch.targets.to(device)

    def _update_oldest(self) -> StepResult:
        pending = self.pending_updates.popleft()
        self.wait_for(pending)
        facts = {name: pending.facts[:, column].tolist() for column, name in enumerate(FACTS)}
        ranks, weight = self.collectives.ranks, sum(facts["weight"])
        learning_rate = self.context.learning_rate(pending.step)
        self.context.reseed(UPDATE, pending.step)
        with self.clock.compute(), self.clock.span("update"):
            grad_norm = self.update(pending, weight, learning_rate)
        self.loss_scale.update(was_finite=grad_norm is not None)
        self._share_buffers(facts)
        slowest = max(range(len(facts["compute_s"])), key=facts["compute_s"].__getitem__)
        compute_s, wait_s = self.clock.take()
        has_waited = slowest != self.collectives.index and wait_s > 0.05 * compute_s
        culprits = [rank for rank, ok in zip(ranks, facts["is_finite"], strict=True) if not ok]
        return StepResult(
            step=pending.step,
            loss=sum(facts["loss_sum"]) / weight if weight else math.nan,
            weight=int(weight),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            compute_s=compute_s,
            wait_s=wait_s,
            waited_for=ranks[slowest] if has_waited else None,
            culprits=tuple(culprits),
            wants_stop=any(facts["wants_stop"]),
            norms=self._norms,
            facts=facts,
            late=pending.late,
        )
