"""The parameter server of edp: it owns the optimizer and applies pushes in the order of arrival.

    rank 1  message, push, message ...  \
    rank 2  push, push ...               >  one queue of events  ->  the server's thread
    rank 3  joins, ..., leaves          /

All that workers do becomes an event of one queue, so one thread takes all decisions, one after the
other. For each worker there is a buffer for one push and a copy of the weights being sent to it, so
that neither changes in flight."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smolrun.algorithms.base import Context, PendingUpdate
from smolrun.algorithms.contract import (
    IDLE,
    UPDATE,
    BatchAssignment,
    BatchPart,
    EvalSums,
    StepResult,
    StepStats,
)
from smolrun.algorithms.edp.base import EDP, FlatModel, Flats
from smolrun.algorithms.edp.protocol import (
    BatchTotals,
    DropReason,
    MessageKind,
    PushHeader,
    WorkMessage,
)
from smolrun.algorithms.edp.work_queue import WorkItem, WorkQueue
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.data.splits import Batch
from smolrun.errors import CheckpointError, WaitTimeout
from smolrun.events import REPLACED, Event, Membership, PushApplied, PushDropped
from smolrun.mesh.mesh import Mesh, Work
from smolrun.parts.parameter_server import SERVER, Channels, decode_gradient
from smolrun.parts.quantization import Quantization

# Learning rate factor by age, the number of updates since the weights that a gradient was computed
# with. Source: Zhang et al., "Staleness-aware Async-SGD for Distributed Deep Learning", 2016.
STALENESS_LR_SCALES: dict[str, Callable[[int], float]] = {
    "none": lambda age: 1.0,
    "inverse": lambda age: 1.0 / (1.0 + age),
    "inverse_sqrt": lambda age: (1.0 + age) ** -0.5,
}

DROP_TEXTS = {
    DropReason.REPLACED: REPLACED,
    DropReason.NOT_FINITE: "it was not finite",
    DropReason.LOST: "its rank is gone",
}


@dataclass(frozen=True)
class WorkerJoined:
    """A worker has connected, for the first time or again."""

    worker: WorkerHandle


@dataclass(frozen=True)
class WorkerLeft:
    """A worker has left or is lost."""

    rank: int
    reason: str


@dataclass(frozen=True)
class MessageReceived:
    """A message of a worker."""

    worker: WorkerHandle
    message: WorkMessage


@dataclass(frozen=True)
class PushReceived:
    """A gradient is in the worker's buffer; without one the item is to be skipped."""

    worker: WorkerHandle
    header: PushHeader
    has_gradient: bool = True


@dataclass(frozen=True)
class WeightsSent:
    """The copy of the weights for a worker may change again."""

    worker: WorkerHandle


ServerEvent = WorkerJoined | WorkerLeft | MessageReceived | PushReceived | WeightsSent
EventQueue = queue.SimpleQueue[ServerEvent]


class WorkerHandle:
    """One connection of a worker, from its joining to its leaving. Puts what the worker does into
    `events` from the I/O thread; all methods are for the server's thread."""

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        flat_model: FlatModel,
        quantization: Quantization,
        events: EventQueue,
    ) -> None:
        """Call it on the I/O thread when the worker joins: it binds to this very connection."""
        self.rank = rank
        self.sent_version = -1
        self.wants_weights = True  # newer ones than it has
        self._is_sending = False
        self._channels = Channels(mesh, rank, mesh.link_with(rank))
        self._flat_model = flat_model
        self._quantization = quantization
        self._events = events
        self._message = WorkMessage.buffer()
        self._header = PushHeader.buffer()
        quantizer = quantization.quantizer()
        self._wires = [
            torch.zeros(
                quantizer.wire_bytes(size, quantization.working_dtype(dtype)), dtype=torch.uint8
            )
            for size, dtype in zip(flat_model.sizes, flat_model.dtypes, strict=True)
        ]
        self._snapshot = flat_model.zeros("cpu")

    def start(self) -> None:
        """Posts the first receives."""
        self._receive_message()
        self.receive_push()

    def send(self, message: WorkMessage) -> None:
        """Starts to send a message."""
        message.send(self._channels)

    def receive_push(self) -> None:
        """Posts the receive of the next push; the last one has been read."""

        def received(work: Work) -> None:
            if work.error is None:  # else the worker is lost, which is an event of its own
                self._events.put(PushReceived(self, PushHeader.read(self._header)))

        self._channels.pushes.receive([self._header, *self._wires]).add_done_callback(received)

    def read_gradient(self, into: Flats) -> None:
        """Decodes the gradient of the last push."""
        for wire, flat in zip(self._wires, into, strict=True):
            decode_gradient(wire, flat, self._quantization)

    def send_weights_if_due(self, version: int) -> None:
        """Starts to send the newest weights, if the worker wants some and none are in flight."""
        if not self.wants_weights or self._is_sending or self.sent_version >= version:
            return
        self._flat_model.copy_to(self._snapshot)
        self.wants_weights, self._is_sending, self.sent_version = False, True, version
        number = torch.tensor([version], dtype=torch.int64)
        work = self._channels.weights.send([number, *self._snapshot])
        work.add_done_callback(lambda _: self._events.put(WeightsSent(self)))

    def weights_sent(self, version: int) -> None:
        """The snapshot may change again: it is sent again, if the worker wants `version`."""
        self._is_sending = False
        self.send_weights_if_due(version)

    def _receive_message(self) -> None:
        def received(work: Work) -> None:
            if work.error is None:
                message = WorkMessage.read(self._message)
                self._receive_message()
                self._events.put(MessageReceived(self, message))

        self._channels.messages.receive([self._message]).add_done_callback(received)


class ParameterServer:
    """All workers of a mesh, and the work queue; for the server's thread. Assigns work, takes back
    what lost workers held, and sends weights. Knows nothing of optimizers.

    `events` collects what metrics.jsonl records of workers and dropped gradients; the caller
    clears it."""

    def __init__(
        self, mesh: Mesh, flat_model: FlatModel, quantization: Quantization, work_queue: WorkQueue
    ) -> None:
        self.workers: dict[int, WorkerHandle] = {}
        self.work_queue = work_queue
        self.events: list[Event] = []
        self._mesh = mesh
        self._flat_model = flat_model
        self._quantization = quantization
        self._steps = 0
        self._queue: EventQueue = queue.SimpleQueue()
        self._requests: list[WorkerHandle] = []  # for work, in order
        self._is_accepting = False
        self._finished: WorkMessage | None = None

    def accept(self, steps: int) -> None:
        """Accepts workers from now on, to train `steps` steps."""
        self._steps = steps
        if not self._is_accepting:
            self._is_accepting = True
            self._mesh.on_membership_change(self._membership_changed)

    def next_push(
        self, timeout_s: float, unless: Callable[[], bool] = lambda: False
    ) -> PushReceived | None:
        """The next push, handling all other events; None after `timeout_s` (0: what has arrived),
        or once an event makes `unless()` true."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                event = self._queue.get(block=left_s > 0, timeout=max(0.0, left_s))
            except queue.Empty:
                return None
            if isinstance(event, PushReceived):
                if self._is_current(event.worker):
                    return event
            else:
                self._handle(event)
                if unless():
                    return None

    def complete(self, push: PushReceived) -> None:
        """The push is applied or skipped: its item is done, and its worker gets newer weights."""
        worker = push.worker
        self.work_queue.complete(worker.rank, push.header.item)
        if push.has_gradient:
            worker.send(WorkMessage(MessageKind.APPLIED, self.work_queue.num_done))
            worker.receive_push()
            worker.wants_weights = True
            worker.send_weights_if_due(self.work_queue.num_done)
        self.assign_work()

    def assign_work(self) -> None:
        """Gives items to the workers that requested some, as far as there are any."""
        for worker in list(self._requests):
            item = self.work_queue.take(worker.rank, self._steps)
            if item is None:
                continue  # there may be one for another worker, which holds none yet
            self._requests.remove(worker)
            worker.send(WorkMessage(MessageKind.ASSIGN_WORK, *item))
            if worker.sent_version < item.min_version:
                worker.wants_weights = True
                worker.send_weights_if_due(self.work_queue.num_done)

    def send_busy(self) -> None:
        """The server will not answer for a while: no worker may time out."""
        for worker in self.workers.values():
            worker.send(WorkMessage(MessageKind.BUSY))

    def finish(self, *, was_stopped: bool) -> None:
        """There is no more work, neither for workers that join later."""
        if self._finished is None:
            self._finished = WorkMessage(MessageKind.FINISHED, int(was_stopped))
            for worker in self.workers.values():
                worker.send(self._finished)

    def wait_until_all_left(self, timeout_s: float) -> None:
        """Blocks until no worker is connected, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.workers and (left_s := deadline - time.monotonic()) > 0:
            try:
                self._handle(self._queue.get(timeout=left_s))
            except queue.Empty:
                return

    def _is_current(self, worker: WorkerHandle) -> bool:
        """Events of a connection that was lost meanwhile do not count."""
        return self.workers.get(worker.rank) is worker

    def _handle(self, event: ServerEvent) -> None:
        if isinstance(event, WorkerJoined):
            self._worker_joined(event.worker)
        elif isinstance(event, WorkerLeft):
            self._worker_left(event)
        elif isinstance(event, PushReceived) or not self._is_current(event.worker):
            return  # pushes after the end
        elif isinstance(event, WeightsSent):
            event.worker.weights_sent(self.work_queue.num_done)
        elif event.message.kind is MessageKind.REQUEST_WORK:
            self._requests.append(event.worker)
            self.assign_work()
        elif event.message.kind is MessageKind.RETURN_WORK:
            self._work_returned(event.worker, event.message.first, DropReason(event.message.second))

    def _work_returned(self, worker: WorkerHandle, item: int, reason: DropReason) -> None:
        if reason is not DropReason.NOT_FINITE:
            self.work_queue.put_back(worker.rank, item)
        elif not self.work_queue.put_back_nonfinite(worker.rank, item):
            header = PushHeader(item, self.work_queue.num_done, 0.0, 0.0, 0.0, 0.0)
            self._queue.put(PushReceived(worker, header, has_gradient=False))
            return
        self._record_dropped(worker.rank, item, reason)
        self.assign_work()

    def _worker_joined(self, worker: WorkerHandle) -> None:
        self.workers[worker.rank] = worker
        worker.start()
        worker.send_weights_if_due(self.work_queue.num_done)
        if self._finished is not None:
            worker.send(self._finished)
        else:
            self.events.append(Membership(self.work_queue.step, worker.rank, True, "joined", 0))

    def _worker_left(self, event: WorkerLeft) -> None:
        worker = self.workers.pop(event.rank, None)
        if worker is None:
            return
        self._requests = [other for other in self._requests if other is not worker]
        lost = self.work_queue.put_back_all(event.rank)
        for item in lost:
            self._record_dropped(event.rank, item, DropReason.LOST)
        if self._finished is None:
            step = self.work_queue.step
            self.events.append(Membership(step, event.rank, False, event.reason, len(lost)))
        self.assign_work()

    def _record_dropped(self, rank: int, item: int, reason: DropReason) -> None:
        self.events.append(PushDropped(self.work_queue.step, rank, item, DROP_TEXTS[reason]))

    def _membership_changed(self, rank: int, is_here: bool, reason: str) -> None:
        """On the I/O thread."""
        if is_here:
            worker = WorkerHandle(
                self._mesh, rank, self._flat_model, self._quantization, self._queue
            )
            self._queue.put(WorkerJoined(worker))
        else:
            self._queue.put(WorkerLeft(rank, reason))


class EDPServer(EDP):
    """Applies every push as an update of its own; may train too."""

    evaluates_locally = True

    def __init__(
        self, context: Context, trains: bool, work_queue: WorkQueue, staleness_lr_scale: str
    ) -> None:
        super().__init__(context)
        self.work_queue = work_queue
        self._trains = trains
        self._lr_scale = STALENESS_LR_SCALES[staleness_lr_scale]
        self._own: WorkItem | None = None  # that the server itself computes
        self._totals = BatchTotals()
        self._events: list[Event] = []

    def place(self, model: torch.nn.Module) -> None:
        """Keeps the model and its optimizer."""
        super().place(model)
        context = self.context
        self.server = ParameterServer(
            context.mesh, self.flat_model, context.quantization, self.work_queue
        )

    def next_assignment(self, steps: int) -> BatchAssignment | None:
        """An item, if the server trains and there is one; else an empty share: it only serves."""
        self.server.accept(steps)
        if self.work_queue.is_complete(steps):
            self.server.finish(was_stopped=False)
            return None
        self._own = self.work_queue.take(SERVER, steps) if self._trains else None
        if self._own is None:
            return BatchAssignment(self.steps_begun, IDLE)
        return BatchAssignment(
            self._own.step, BatchPart(self._own.number % self._own.per_step, self._own.per_step)
        )

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult | None:
        """Blocks until a global batch is applied; a server that trains only applies what has
        arrived, and returns None before the batch is complete."""
        self.context.mesh.progress = self.steps_begun
        trains, limit_s = self._own is not None, self.context.mesh.timeout_s
        if self._own is not None:
            header = self.compute_gradient(self._own, self.work_queue.num_done, micro_batches)
            self._apply(SERVER, header)
            self.work_queue.complete(SERVER, header.item)
            self.server.assign_work()
        while self._totals.num_pushes < self.work_queue.per_step:
            with self.clock.waiting():
                push = self.server.next_push(0.0 if trains else limit_s, unless=self._can_train)
            if push is None and (trains or self._can_train()):
                return None
            if push is None:
                count = len(self.server.workers)
                raise WaitTimeout(f"no gradient for {limit_s:g} s; {count} workers are connected")
            if push.has_gradient:
                push.worker.read_gradient(self.gradients)
                self._apply(push.worker.rank, push.header)
            else:
                self._record(push.worker.rank, push.header, None)
            self.server.complete(push)
        return self._end_of_batch()

    def _can_train(self) -> bool:
        """Whether the server trains and there is a returned item, perhaps of the last worker."""
        return self._trains and self.work_queue.has_returned

    def _apply(self, rank: int, header: PushHeader) -> None:
        """One update: the mean gradient of the push, clipped, at a learning rate by its age."""
        with self.clock.compute():
            age = self.work_queue.num_done - header.version
            # The rate is scaled, not the gradient: Adam divides by the gradient's own norm, so a
            # smaller gradient would step as far.
            rate = self.context.learning_rate(self.steps_begun) * self._lr_scale(age)
            pending = PendingUpdate(self.steps_begun, StepStats.of_rank(rank, {}), [])
            self.context.reseed(UPDATE, self.work_queue.num_done)
            norm = self.update(pending, header.num_targets, rate)
        if rank == SERVER:
            self.loss_scale.update(was_finite=norm is not None)
        self._record(rank, header, norm)

    def _record(self, rank: int, header: PushHeader, norm: float | None) -> None:
        self._totals.add(rank, header, norm)
        item, version, age = header.item, header.version, self.work_queue.num_done - header.version
        samples = int(header.num_samples)
        self._events.append(PushApplied(self.steps_begun, rank, item, version, age, samples, norm))

    def _end_of_batch(self) -> StepResult:
        step, self.steps_begun = self.steps_begun, self.work_queue.step
        self._totals.wants_stop |= self.wants_stop
        if self._totals.wants_stop:
            self.server.finish(was_stopped=True)
        events = [*self._events, *self.server.events]
        totals, self._totals = self._totals, BatchTotals()
        self._events.clear()
        self.server.events.clear()
        return self.result(step, totals, events)

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalSums:
        """Keeps workers from timing out meanwhile."""
        self.server.send_busy()
        return super().eval_step(micro_batches)

    def finish(self) -> None:
        """Blocks until all workers have left: they have been sent that the run is finished."""
        self.server.wait_until_all_left(self.context.mesh.timeout_s)

    def state(self) -> dict[str, Any]:
        """With the open work items; those that are held will be computed again."""
        return {**super().state(), "tickets": self.work_queue.state()}

    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """Of any algorithm: without work items, those of all steps begun are done."""
        if state["in_flight"]:
            raise CheckpointError(
                f"{checkpoint.folder} has gradients that no update has used, and algorithm=edp has "
                "no place for them; resume with its own algorithm: at the end there are none"
            )
        super().restore(checkpoint, state)
        done = self.steps_begun * self.work_queue.per_step
        fresh = {"per_step": self.work_queue.per_step, "next": done, "open": []}
        self.work_queue.restore(state.get("tickets", fresh))
