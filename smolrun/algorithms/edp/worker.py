"""A worker of edp: it computes gradients, has no optimizer, and knows nothing of other workers.

    computing   [ item 4 ][ item 7 ][ item 9 ][ item 12 ]
    up              [ push 4          ][ push 9         ]      7 had not left yet when 9 was ready:
    down                        [ weights ]    [ weights ]     9 replaces it, 7 is returned

A push is in flight until the server has applied it, and at most one waits behind it. A newer
gradient replaces the waiting one, as newer gradients are worth more; the replaced item is returned
to the queue. Weights arrive in a buffer of their own and are loaded between two items.

Source: Dean et al., "Large Scale Distributed Deep Networks", 2012 (Downpour: push and pull in the
background)."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smolrun.algorithms.base import Context
from smolrun.algorithms.contract import BatchAssignment, BatchPart, StepResult
from smolrun.algorithms.edp.base import EDP, FlatModel, Flats
from smolrun.algorithms.edp.protocol import (
    BatchTotals,
    DropReason,
    MessageKind,
    PushHeader,
    WorkMessage,
)
from smolrun.algorithms.edp.work_queue import WorkItem
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.data.splits import Batch
from smolrun.errors import WaitTimeout
from smolrun.mesh.mesh import Mesh, Work
from smolrun.parts.parameter_server import SERVER, Channels
from smolrun.parts.quantization import ErrorFeedback, Quantization


class WaitBudget:
    """How long a worker waits for weights that contain its own push: `fraction` of the time that an
    item takes to compute, and only where the last round trip was that short. Pure; times in s.

        short round trip   [ compute ][ push, weights ][ compute ][ push, weights ]   age N - 1
        long round trip    [ compute ][ compute ][ compute ]                          age 2 N - 1
                                      push, weights ...

    Weights without a worker's last push also lack what all others pushed meanwhile, so the next
    gradient is about twice as stale: a short wait is worth it, a long one is not."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._started_s = 0.0
        self._limit_s = 0.0  # of a wait after the last item
        self._pushed_s: float | None = None  # None: no push is outstanding
        self._round_trip_s = 0.0  # the last one, or as long as it has taken so far

    def start_item(self, now_s: float) -> None:
        """Computing begins."""
        self._started_s = now_s

    def push(self, now_s: float) -> None:
        """The gradient of the item is pushed."""
        self._limit_s = self._fraction * (now_s - self._started_s)
        if self._pushed_s is not None:  # the last push is still outstanding
            self._round_trip_s = now_s - self._pushed_s
        self._pushed_s = now_s

    def weights_arrived(self, now_s: float) -> None:
        """The newest weights contain the last push."""
        if self._pushed_s is not None:
            self._round_trip_s = now_s - self._pushed_s
            self._pushed_s = None

    def remaining_s(self, now_s: float) -> float:
        """How much longer to wait; 0: continue with the weights that are here."""
        if self._pushed_s is None or self._round_trip_s > self._limit_s:
            return 0.0
        return max(0.0, self._pushed_s + self._limit_s - now_s)


@dataclass(frozen=True)
class _Push:
    """An encoded gradient."""

    header: PushHeader
    wires: list[torch.Tensor]  # uint8, one per flat tensor


class ParameterServerClient:
    """A worker's connection to the server: receives work items and weights, pushes gradients.

    Public methods are for the worker's thread; replies arrive on the I/O thread. Both share the
    state under one lock."""

    def __init__(
        self, mesh: Mesh, flat_model: FlatModel, quantization: Quantization, budget: WaitBudget
    ) -> None:
        self.was_stopped = False
        self._mesh = mesh
        self._channels = Channels(mesh, SERVER)
        self._flat_model = flat_model
        self._quantizer = quantization.quantizer()
        self._dtypes = [quantization.working_dtype(dtype) for dtype in flat_model.dtypes]
        self._feedbacks = [
            ErrorFeedback(size, dtype)
            for size, dtype in zip(flat_model.sizes, self._dtypes, strict=True)
            if quantization.error_feedback and not quantization.is_none
        ]
        self._changed = threading.Condition()
        self._has_started = False
        self._error: BaseException | None = None
        self._is_finished = False
        self._items: deque[WorkItem] = deque()
        self._last_message_s = time.monotonic()
        self._message = WorkMessage.buffer()
        self._in_flight: _Push | None = None
        self._waiting: _Push | None = None
        self._free: list[list[torch.Tensor]] = []  # wires to reuse
        self._weights: Flats = flat_model.zeros("cpu")
        self._weights_version = torch.zeros(1, dtype=torch.int64)
        self._is_fresh = False  # `_weights` are not loaded yet
        self._received_version = -1
        self._loaded_version = -1
        self._budget = budget
        self._applied_version = 0  # weights from this version on contain the last push

    def next_item(self) -> WorkItem | None:
        """Blocks until there is an item and the weights it needs, and while the wait budget lasts;
        None when the run is finished. Requests the item after it.

        WaitTimeout if the server is alive but sends nothing, PeerLost if it is lost."""
        if not self._has_started:
            self._has_started = True
            self._receive_message()
            self._receive_weights()
            self._request_work()
        since_s = time.monotonic()
        while True:
            version = self.load_weights()  # also while waiting: the buffer is then free again
            with self._changed:
                if self._is_finished:
                    return None
                self._raise_error()
                now_s = time.monotonic()
                is_ready = bool(self._items) and version >= max(0, self._items[0].min_version)
                budget_s = self._budget.remaining_s(now_s)
                if is_ready and budget_s <= 0:
                    item = self._items.popleft()
                    self._budget.start_item(now_s)
                    break
                if not self._is_fresh:
                    self._changed.wait(budget_s if is_ready else self._timeout_s(since_s, now_s))
        self._request_work()
        return item

    def load_weights(self) -> int:
        """Copies the newest received weights into the model; returns their version."""
        with self._changed:
            is_fresh = self._is_fresh
        if is_fresh:
            self._flat_model.load(self._weights)
            self._loaded_version = int(self._weights_version.item())
            self._is_fresh = False
            self._receive_weights()
        return self._loaded_version

    def push(self, header: PushHeader, gradient: Flats) -> None:
        """Starts to push a copy of a gradient, or queues it behind the one in flight."""
        with self._changed:
            replaced, self._waiting = self._waiting, None
            if replaced is not None:
                self._free.append(replaced.wires)
            wires = self._free.pop() if self._free else None
        for feedback in self._feedbacks:
            feedback.settle(is_kept=replaced is None)
        push = _Push(header, self._encode(gradient, wires))
        with self._changed:
            self._raise_error()
            self._budget.push(time.monotonic())
            if self._in_flight is None:
                self._start(push)
            else:
                self._waiting = push
        if replaced is not None:
            self.return_item(replaced.header.item, DropReason.REPLACED)

    def return_item(self, item: int, reason: DropReason) -> None:
        """Returns an item to the server's queue."""
        WorkMessage(MessageKind.RETURN_WORK, item, reason).send(self._channels)

    # -- under the lock, or on the I/O thread ----

    def _timeout_s(self, since_s: float, now_s: float) -> float:
        """Counted from the last message, or from when the worker began to wait."""
        left_s = max(since_s, self._last_message_s) + self._mesh.timeout_s - now_s
        if left_s <= 0:
            raise WaitTimeout(
                f"rank {self._mesh.rank}: no work from rank {SERVER} for "
                f"{self._mesh.timeout_s:g} s although it is alive",
                SERVER,
            )
        return left_s

    def _raise_error(self) -> None:
        if self._error is not None and not self._is_finished:
            raise self._error

    def _request_work(self) -> None:
        WorkMessage(MessageKind.REQUEST_WORK).send(self._channels)

    def _encode(self, gradient: Flats, wires: list[torch.Tensor] | None) -> list[torch.Tensor]:
        encoded = []
        for index, flat in enumerate(gradient):
            wire, lost = wires[index] if wires else None, None
            values = flat.cpu().to(self._dtypes[index])
            if self._feedbacks:
                residual, lost = self._feedbacks[index].take()
                values = values + residual
            encoded.append(self._quantizer.encode(values, wire, lost))
        return encoded

    def _start(self, push: _Push) -> None:
        self._in_flight = push
        self._channels.pushes.send([push.header.tensor(), *push.wires]).add_done_callback(
            self._set_error
        )

    def _push_applied(self) -> None:
        assert self._in_flight is not None, "the server applies what was pushed"
        self._free.append(self._in_flight.wires)
        self._in_flight, waiting, self._waiting = None, self._waiting, None
        if waiting is not None:
            self._start(waiting)
        self._check_weights()

    def _check_weights(self) -> None:
        if self._in_flight is None and self._received_version >= self._applied_version:
            self._budget.weights_arrived(time.monotonic())

    def _receive_weights(self) -> None:
        def received(work: Work) -> None:
            with self._changed:
                self._is_fresh = work.error is None
                self._received_version = int(self._weights_version.item())
                self._check_weights()
                self._changed.notify_all()
            self._set_error(work)

        buffers = [self._weights_version, *self._weights]
        self._channels.weights.receive(buffers).add_done_callback(received)

    def _receive_message(self) -> None:
        self._channels.messages.receive([self._message]).add_done_callback(self._message_received)

    def _message_received(self, work: Work) -> None:
        if work.error is not None:
            self._set_error(work)
            return
        message = WorkMessage.read(self._message)
        self._receive_message()
        with self._changed:
            self._last_message_s = time.monotonic()
            if message.kind is MessageKind.ASSIGN_WORK:
                self._items.append(WorkItem(message.first, message.second, message.third))
            elif message.kind is MessageKind.APPLIED:
                self._applied_version = message.first
                self._push_applied()
            elif message.kind is MessageKind.FINISHED:
                self._is_finished, self.was_stopped = True, bool(message.first)
            self._changed.notify_all()

    def _set_error(self, work: Work) -> None:
        if work.error is not None:
            with self._changed:
                self._error = self._error or work.error
                self._changed.notify_all()


class EDPWorker(EDP):
    """One work item a step; neither evaluates nor saves."""

    can_evaluate = has_checkpoint_state = False

    def __init__(self, context: Context, wait_fraction: float) -> None:
        super().__init__(context)
        self._budget = WaitBudget(wait_fraction)

    def place(self, model: torch.nn.Module) -> None:
        """Keeps a replica without an optimizer; the weights will come from the server."""
        super().place(model)
        del self.optimizer
        context = self.context
        self.client = ParameterServerClient(
            context.mesh, self.flat_model, context.quantization, self._budget
        )
        self._item: WorkItem | None = None

    def checkpoint_bytes(self) -> int:
        """0: the server saves everything."""
        return 0

    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """A no-op: everything comes from the server."""

    def load_weights(self, checkpoint: CheckpointReader) -> None:
        """A no-op, as `restore`."""

    def next_assignment(self, steps: int) -> BatchAssignment | None:
        """The next item; blocks while the server has none, or the weights are too old."""
        with self.clock.waiting():
            self._item = item = self.client.next_item()
        if item is None:
            self.steps_begun = 0 if self.client.was_stopped else steps
            return None
        return BatchAssignment(item.step, BatchPart(item.number % item.per_step, item.per_step))

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Computes one item; its push continues in the background."""
        item = self._item
        assert item is not None, "there is no share without an item"
        self.context.mesh.progress = item.step
        version = self.client.load_weights()
        header = self.compute_gradient(item, version, micro_batches)
        norm = math.sqrt(self.norm_squared(self.gradients)) / max(header.num_targets, 1.0)
        is_finite = math.isfinite(norm)
        self.loss_scale.update(was_finite=is_finite)
        if is_finite:
            self.client.push(header, self.gradients)
        else:  # another attempt has newer weights, and in fp16 another loss scale
            self.client.return_item(item.number, DropReason.NOT_FINITE)
        totals = BatchTotals()
        totals.add(self.context.mesh.rank, header, norm if is_finite else None)
        totals.wants_stop = False  # the server decides that
        return self.result(item.step, totals)
