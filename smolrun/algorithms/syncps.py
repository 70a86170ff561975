"""A synchronous parameter server: workers push gradients to rank 0, which alone has the optimizer,
and pull the new weights.

    worker 1   forward backward [push]         [pull] forward ...
    worker 2   forward backward [push]         [pull] forward ...
    server     (forward backward)  sum, step, send

    push    stats of the rank      gradient of bucket 0, 1, 2 ...     from rank to server
    pull    verdict, all stats     weights in the same buckets        from server to rank

A bucket is pushed as soon as backward has filled it, and the weights are pulled into the same
memory. With staleness K a worker waits at step t for the reply to its push of step t-K. The server
sums in rank order, its own gradient first.

With `straggler_timeout_s` the server waits that long after the first gradient of a step. A later
one is dropped, and its worker continues with the newest weights at the server's next step, together
with all others. (With weights in the middle of a step it would be late for ever.)

Source: Li et al., "Scaling Distributed Machine Learning with the Parameter Server", 2014; Polyak
and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992 (the average)."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Algorithm, Context, EvalSums, PendingUpdate
from smolrun.algorithms.bucketed import BucketedAlgorithm
from smolrun.algorithms.contract import STEP_STATS, StepStats
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Mesh, Work
from smolrun.parts.buckets import Bucket, GradientBuckets
from smolrun.parts.parameter_server import SERVER, Channels, decode_gradient
from smolrun.parts.placement import DataCoordinates
from smolrun.parts.quantization import Quantization

_IS_FINITE, _WANTS_STOP = STEP_STATS.index("is_finite"), STEP_STATS.index("wants_stop")
_VERDICT = 4  # step, gradient norm, loss scale and its age: before the stats of all ranks
_POLL_S = 0.25  # a lost worker is noticed this late while the server waits for any of several


def syncps(
    context: Context,
    *,
    server_trains: bool,
    straggler_timeout_s: float,
    ema_decay: float,
    pull_weights: str,
    bucket_mb: float,
) -> Algorithm:
    """The server on rank 0, a worker on every other rank."""
    common: dict[str, Any] = {
        "server_trains": server_trains,
        "straggler_timeout_s": straggler_timeout_s,
        "pulls_average": pull_weights == "average",
        "bucket_mb": bucket_mb,
    }
    if context.mesh.rank == SERVER:
        return SyncPSServer(context, ema_decay=ema_decay, **common)
    return SyncPSWorker(context, **common)


class SyncPS(BucketedAlgorithm):
    """What server and workers share: gradient buckets, and one row of stats per rank."""

    def __init__(
        self,
        context: Context,
        *,
        server_trains: bool,
        straggler_timeout_s: float,
        pulls_average: bool,
        bucket_mb: float,
    ) -> None:
        super().__init__(context, bucket_mb=bucket_mb)
        self._server_trains = server_trains
        self._straggler_timeout_s = straggler_timeout_s
        self._pulls_average = pulls_average
        self.is_lockstep = not straggler_timeout_s

    def data_coordinates(self, speeds: Sequence[float]) -> DataCoordinates:
        """By speed; 0 for a server that does not train."""
        weights = speeds if self._server_trains else [0.0, *speeds[1:]]
        return DataCoordinates(self.context.mesh.rank, weights)

    def residual_slices(self) -> Iterator[TensorSlice]:
        """None where late gradients are dropped: ranks do not save together there."""
        if self.is_lockstep:
            yield from super().residual_slices()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are pushed and weights pulled, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def stats_row(self, stats: Mapping[str, float]) -> Tensor:
        """This rank's stats of a step as they are pushed, float64; adds whether all was finite."""
        row = {**stats, "is_finite": float(self._is_finite)}
        return torch.tensor([row[name] for name in STEP_STATS], dtype=torch.float64)

    def reply_header(
        self, verdict: Sequence[float] = (0,) * _VERDICT, table: Tensor | None = None
    ) -> Tensor:
        """What is pulled before the weights, float64: the verdict and the stats of all ranks."""
        if table is None:
            table = torch.zeros((self.collectives.size, len(STEP_STATS)))
        return torch.cat([torch.tensor(verdict, dtype=torch.float64), table.double().flatten()])


def averages_in(
    checkpoint: CheckpointReader, values: Mapping[str, Tensor]
) -> Iterator[TensorSlice]:
    """Those of `values`, by parameter name, whose average the checkpoint has."""
    for name, value in values.items():
        if (key := f"average/{name}") in checkpoint.manifest.tensors:
            yield TensorSlice.whole(key, value)


class SyncPSWorker(SyncPS):
    """Pushes its gradients and pulls weights; has no optimizer, knows nothing of other workers."""

    can_evaluate = False

    def place(self, model: nn.Module) -> None:
        """Keeps a replica that is never stepped here."""
        super().place(model)
        del self.optimizer
        self.has_checkpoint_state = self.is_lockstep  # the quantization residuals
        self._channels = Channels(self.context.mesh, SERVER)
        self._headers: dict[int, Tensor] = {}  # step of the push -> header of the reply
        self._message = -1  # that is being pushed

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Pushes full buckets meanwhile."""
        self._message = self._channels.pushes.begin_send()
        return super().forward_backward(micro_batches)

    def send(self, bucket: Bucket, slot: int) -> Work:
        """Starts to push a full bucket."""
        wire = self.reducer.encode(bucket.to_host(slot), bucket.index, slot)
        return self._channels.pushes.send_part(self._message, 1 + bucket.index, wire)

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """Pushes the stats, which complete the push, and posts the receive of the reply."""
        step, row = self.steps_begun, self.stats_row(stats)
        pushed = self._channels.pushes.send_part(self._message, 0, row)
        own = StepStats(STEP_STATS, [self.context.mesh.rank], row.view(1, -1))
        return PendingUpdate(step, own, [*self._works, pushed, self._receive_reply(step)])

    def _receive_reply(self, step: int) -> Work:
        """Into the buckets of that push, which the server answers once it has all of it."""
        self._headers[step] = header = self.reply_header()
        buffers = [header, *(bucket.host[self.slot(step)] for bucket in self.buckets.buckets)]
        return self._channels.weights.receive(buffers, f"weights for the push of step {step}")

    def wait_for(self, pending: PendingUpdate) -> None:
        """Takes over the server's verdict, which is of its own step if this gradient was late."""
        super().wait_for(pending)
        verdict, table = self._headers.pop(pending.step).tensor_split([_VERDICT])
        step, self._norm, scale, good_steps = verdict.tolist()
        self.loss_scale.value, self.loss_scale.good_steps = scale, int(good_steps)
        self._was_late = int(step) != pending.step
        self.steps_begun += int(step) - pending.step
        pending.step = int(step)
        table = table.view(-1, len(STEP_STATS))
        pending.stats = StepStats(STEP_STATS, self.collectives.ranks, table)

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """Loads the pulled weights. Quantization residuals count if the push did."""
        is_made = math.isfinite(self._norm)
        self.reducer.settle(self.slot(pending.step), is_kept=is_made and not self._was_late)
        pulled = self.buckets.host_gradients(self.slot(pending.step))
        for parameter, values in zip(self.trained().values(), pulled, strict=True):
            parameter.copy_(values)
        return self._norm if is_made else None

    def finish(self) -> None:
        """Waits for the replies to pushes in flight, which a stopped run has: the server sends
        them."""
        for pending in self.pending_updates:
            super().wait_for(pending)
        super().finish()

    def owned(self) -> Iterator[TensorSlice]:
        """The quantization residuals; the server saves all else."""
        return self.residual_slices()

    def checkpoint_bytes(self) -> int:
        """Of all workers together."""
        return self.residual_bytes()

    @torch.no_grad()
    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """Reads the weights that workers pull, and expects replies to the pushes in flight."""
        checkpoint.load(self.model_slices(), all_of="model/")
        if self._pulls_average:
            checkpoint.load(averages_in(checkpoint, dict(self.model.named_parameters())))
        self.restore_progress(checkpoint, state)
        for pending in self.pending_updates:
            pending.works = [self._receive_reply(pending.step)]
        self.restore_residuals(checkpoint)


class WeightAverage:
    """Exponential moving average of parameters, by name: `decay * average + (1 - decay) * weights`
    after every update. With decay 0 there is none. The model keeps the newest weights."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.values: dict[str, Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Starts from the present weights."""
        if self._decay:
            self.values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Adds the newest weights."""
        for name, value in self.values.items():
            value.lerp_(self._parameters[name], 1 - self._decay)

    @contextmanager
    def swapped_in(self, is_wanted: bool = True) -> Iterator[None]:
        """The model has the average for its weights inside; nothing is copied."""
        self._swap(is_wanted)
        try:
            yield
        finally:
            self._swap(is_wanted)

    def _swap(self, is_wanted: bool) -> None:
        for name in self.values if is_wanted else ():
            parameter = self._parameters[name]
            parameter.data, self.values[name] = self.values[name], parameter.data


@dataclass
class WorkerBuffers:
    """The server's memory for one worker, per slot. The pull is sent from where the push arrived:
    a worker pushes again only after it has all of the last reply.

    `flat[slot]` (one tensor per bucket) and `views[slot]` (one per parameter) share memory;
    `pushed[slot]` is `flat[slot]`, or uint8 tensors where gradients are quantized."""

    rank: int
    channels: Channels
    stats: list[Tensor]
    pushed: list[list[Tensor]]
    flat: list[list[Tensor]]
    views: list[list[Tensor]]
    expected: dict[int, Work] = field(default_factory=dict)  # step -> receive of its push
    unanswered: list[int] = field(default_factory=list)  # steps whose push is complete
    num_dropped: int = 0

    @classmethod
    def of(
        cls, mesh: Mesh, rank: int, buckets: GradientBuckets, quantization: Quantization
    ) -> WorkerBuffers:
        """As large as the buckets, with as many slots."""
        rooms = [buckets.room() for _ in range(buckets.slots)]
        flat, pushed = [flat for flat, _ in rooms], [flat for flat, _ in rooms]
        if not quantization.is_none:
            size = quantization.quantizer().wire_bytes
            pushed = [
                [torch.empty(size(bucket.numel()), dtype=torch.uint8) for bucket in slot]
                for slot in flat
            ]
        stats = [torch.empty(len(STEP_STATS), dtype=torch.float64) for _ in rooms]
        return cls(rank, Channels(mesh, rank), stats, pushed, flat, [views for _, views in rooms])

    def receive_push(self, step: int, slot: int) -> None:
        """Posts the receive of a push, a step ahead: a worker cannot send large tensors before."""
        label = f"push of step {step} from rank {self.rank}"
        buffers = [self.stats[slot], *self.pushed[slot]]
        self.expected[step] = self.channels.pushes.receive(buffers, label)

    def take_push(self, step: int) -> Work:
        """Notes that the push of a step is to be answered; wait for the work before reading it."""
        self.unanswered.append(step)
        return self.expected.pop(step)

    def reply(self, step: int, slot: int, header: Tensor, weights: Sequence[Tensor]) -> None:
        """Starts to send the weights, one per parameter, to a worker that has pushed `step`."""
        self.unanswered.remove(step)
        for view, value in zip(self.views[slot], weights, strict=True):
            view.copy_(value)
        self.channels.weights.send([header, *self.flat[slot]])


class SyncPSServer(SyncPS):
    """Owns the optimizer, and an average of the weights if there is one."""

    evaluates_locally = True

    def __init__(self, context: Context, *, ema_decay: float, **common: Any) -> None:
        super().__init__(context, **common)
        self._decay = ema_decay
        self._unsummed: dict[int, list[WorkerBuffers]] = {}  # step -> workers whose push is here
        self._reply = self.reply_header()  # the last one
        self._nothing = Work("own gradient", context.mesh)
        self._nothing.finish()

    def place(self, model: nn.Module) -> None:
        """Keeps the model, the optimizer, and buffers for every worker."""
        super().place(model)
        mesh, quantization = self.context.mesh, self.context.quantization
        self.average = WeightAverage(self.trained(), self._decay)
        self.workers = [
            WorkerBuffers.of(mesh, rank, self.buckets, quantization)
            for rank in range(SERVER + 1, mesh.world_size)
        ]

    # -- a step ----

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Pushes arrive meanwhile."""
        for worker in self.workers:
            if self.is_lockstep or not worker.expected:
                worker.receive_push(self.steps_begun, self.slot(self.steps_begun))
        with self.average.swapped_in(self._pulls_average):
            return super().forward_backward(micro_batches)

    def send(self, bucket: Bucket, slot: int) -> Work:
        """A no-op: the server's own gradient is here, and is not quantized. Residuals restored from
        a run on other ranks are added to it."""
        own = bucket.to_host(slot)
        if self.reducer.has_feedback:
            owed = self.reducer.feedback(bucket.index, slot, own.numel(), own.dtype).residual
            own.add_(owed)
            owed.zero_()
        return self._nothing

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """Starts nothing: the receives are posted."""
        table = torch.zeros((self.collectives.size, len(STEP_STATS)), dtype=torch.float64)
        table[:, _IS_FINITE] = 1  # of late ranks too
        table[SERVER] = self.stats_row(stats)
        shared = StepStats(STEP_STATS, self.collectives.ranks, table)
        return PendingUpdate(self.steps_begun, shared, [])

    def wait_for(self, pending: PendingUpdate) -> None:
        """Takes the pushes of this step, without late ones, and late ones of earlier steps."""
        if not self.is_lockstep:
            self._wait_for_stragglers(pending)
        for worker in self.workers:
            for step, receiving in list(worker.expected.items()):
                is_late = (
                    worker.rank in pending.late if step == pending.step else not receiving.is_done
                )
                if step > pending.step or is_late:
                    continue
                self.clock.wait(worker.take_push(step))
                row = worker.stats[self.slot(step)]
                if step == pending.step:
                    pending.stats.table[worker.rank] = row
                    self._unsummed.setdefault(step, []).append(worker)
                else:  # its gradient was dropped, its request to stop counts
                    pending.stats.table[worker.rank, _WANTS_STOP] = row[_WANTS_STOP]

    def _wait_for_stragglers(self, pending: PendingUpdate) -> None:
        pushes = {
            worker.rank: worker.expected[pending.step]
            for worker in self.workers
            if pending.step in worker.expected
        }
        started = time.perf_counter() if self._server_trains else None
        with self.clock.waiting():
            late = self._late_ranks(pushes, started)
        for worker in self.workers:
            if worker.rank in late:
                worker.num_dropped += 1
                pending.late[worker.rank] = worker.num_dropped

    def _late_ranks(self, pushes: Mapping[int, Work], started_s: float | None) -> list[int]:
        """Waits until all `pushes` are here, or the timeout after the first of them (or after
        `started_s`, by perf_counter) is over; returns the ranks that are missing."""
        begun_s = time.perf_counter()
        arrived: queue.SimpleQueue[Work] = queue.SimpleQueue()
        for push in pushes.values():
            push.add_done_callback(arrived.put)
        while True:
            late = [rank for rank, push in pushes.items() if not push.is_done]
            now_s = time.perf_counter()
            firsts = [push.done_s for push in pushes.values() if push.is_done]
            firsts += [] if started_s is None else [started_s]
            left_s = min(firsts) + self._straggler_timeout_s - now_s if firsts else _POLL_S
            if not late or left_s <= 0:
                return late
            if now_s - begun_s > self.context.mesh.timeout_s:
                pushes[late[0]].wait(0)  # raises WaitTimeout, which names the rank
            try:
                arrived.get(timeout=min(left_s, _POLL_S))
            except queue.Empty:
                continue

    def bind_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """Binds the sum of all gradients that are here."""
        self._sum_pushes(pending)
        return super().bind_gradients(pending)

    def pending_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """The sums of a pending that is here."""
        self._sum_pushes(pending)
        return super().pending_gradients(pending)

    def _sum_pushes(self, pending: PendingUpdate) -> None:
        slot, quantization = self.slot(pending.step), self.context.quantization
        for worker in self._unsummed.pop(pending.step, []):
            for bucket, pushed in zip(self.buckets.buckets, worker.pushed[slot], strict=True):
                if quantization.is_none:
                    bucket.host[slot].add_(pushed)
                else:
                    decode_gradient(pushed, bucket.host[slot], quantization, adds=True)

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """Steps, then sends the verdict and the weights to all that have pushed."""
        norm = super().update(pending, weight, learning_rate)
        if norm is not None:
            self.average.update()
        scale = self.loss_scale
        verdict = [pending.step, math.nan if norm is None else norm, scale.value, scale.good_steps]
        self._reply = self.reply_header(verdict, pending.stats.table)
        self._reply_to_pushes(pending.step)
        return norm

    def _reply_to_pushes(self, until: int) -> None:
        """To all pushes of steps up to `until` that are here."""
        weights = {**self.trained(), **(self.average.values if self._pulls_average else {})}
        for worker in self.workers:
            for step in [step for step in worker.unanswered if step <= until]:
                worker.reply(step, self.slot(step), self._reply, list(weights.values()))

    @torch.no_grad()
    def finish(self) -> None:
        """Answers every push before it leaves."""
        for worker in self.workers:
            for step in list(worker.expected):
                self.clock.wait(worker.take_push(step))
        self._reply_to_pushes(self.steps_begun)
        super().finish()

    # -- evaluation and checkpoints ----

    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalSums:
        """Of the average, if there is one."""
        with self.average.swapped_in():
            return super().eval_step(micro_batches)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the average, if there is one."""
        with self.average.swapped_in():
            return super().logits(tokens)

    def replica_tensors(self) -> dict[str, Tensor]:
        """The weights that workers have."""
        weights = super().replica_tensors()
        if not self._pulls_average or not hasattr(self, "average"):
            return weights
        with self.average.swapped_in():
            return {name: tensor.data for name, tensor in weights.items()}

    def owned(self) -> Iterator[TensorSlice]:
        """Everything, with the average; workers write nothing of it."""
        for part in super().owned():
            yield replace(part, writer="this")
        for name, value in self.average.values.items():
            yield TensorSlice.whole(f"average/{name}", value, "this")

    def checkpoint_bytes(self) -> int:
        """With the average."""
        return super().checkpoint_bytes() + sum(v.nbytes for v in self.average.values.values())

    def load_weights(self, checkpoint: CheckpointReader) -> None:
        """With a new average from them."""
        super().load_weights(checkpoint)
        self.average.restart()

    @torch.no_grad()
    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """With the average, or a new one from the weights; the pushes in flight are unanswered."""
        super().restore(checkpoint, state)
        self.average.restart()
        checkpoint.load(averages_in(checkpoint, self.average.values))
        for worker in self.workers:
            worker.unanswered = [pending.step for pending in self.pending_updates]
