"""Batches on their way through the stages: each rank runs its layers and passes hidden states on;
what the last one samples returns to rank 0.

    rank 0                       rank 1                       rank 2
    schedule, stage 0 -- plan, hidden --> stage 1 -- plan, hidden --> stage 2, sample
        ^------------------------------- result (token ids) -------------------|

The plan (a Batch) rides in front of the hidden states, so that stages agree without a round trip,
and only ids and log-probabilities come back. Every message begins with a frame of fixed size, which
is sent at once; nothing is sent and no time limit runs while nothing is asked. The scheduler
bounds how many batches are under way, so nothing here needs a limit of its own. A lost peer fails
every receive, and thereby each loop, with PeerLost.

Shape suffixes: T tokens of the batch, D width.
"""

from __future__ import annotations

import itertools
import queue
import struct
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import torch
from torch import Tensor

from smolrun.errors import ProtocolError, SmolrunError
from smolrun.mesh.mesh import Mesh, Work
from smolrun.mesh.streams import Stream
from smolrun.serving.batch import Batch, BatchResult
from smolrun.serving.messages import StageStats
from smolrun.serving.stage_runner import StageRunner, StageTimes, run_timed
from smolrun.wire.frame import Tag

_LENGTH = struct.Struct("<I")
# A plan of 30 sequences that decode fits; longer ones take a second tensor.
_FRAME_BYTES = 512
_INLINE_BYTES = _FRAME_BYTES - _LENGTH.size
MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # far above the token ids of a batch


class StagePlan(msgspec.Struct, frozen=True, array_like=True):
    """What travels with hidden states. No batch: the stages end, in order. `stages`: every stage
    adds its figures; None: they are not asked for."""

    batch: Batch | None
    stages: list[StageStats] | None = None


def send_message(
    mesh: Mesh, peer: int, stream: Stream, number: int, data: bytes, tensor: Tensor | None = None
) -> None:
    """Start sending a message, and a contiguous tensor that belongs to it and must not change any
    more; does not block."""
    frame = bytearray(_FRAME_BYTES)
    _LENGTH.pack_into(frame, 0, len(data))
    inline = data[:_INLINE_BYTES]
    frame[_LENGTH.size : _LENGTH.size + len(inline)] = inline
    mesh.send(peer, Tag(stream, number, 0), torch.frombuffer(frame, dtype=torch.uint8))
    if rest := bytearray(data[_INLINE_BYTES:]):
        mesh.send(peer, Tag(stream, number, 1), torch.frombuffer(rest, dtype=torch.uint8))
    if tensor is not None and tensor.numel():
        mesh.send(peer, Tag(stream, number, 2), tensor)


_M = TypeVar("_M")


class MessageReceiver(Generic[_M]):
    """Receives the messages of one peer and stream in order, ahead of the loop that takes them.

    `decode(data)` is the message and the tensor that comes with it, to be filled, or None.
    `deliver` gets both, and returns whether another message will follow; `fail` gets the error
    that ended it. All run on the I/O thread."""

    def __init__(
        self,
        mesh: Mesh,
        peer: int,
        stream: Stream,
        decode: Callable[[bytes], tuple[_M, Tensor | None]],
        deliver: Callable[[_M, Tensor | None], bool],
        fail: Callable[[BaseException], object],
        times: StageTimes,
    ) -> None:
        self._mesh, self._peer, self._stream = mesh, peer, stream
        self._decode, self._deliver, self._fail = decode, deliver, fail
        self._times = times
        self._number, self._began_s = 0, 0.0
        self._receive_frame()

    def _receive(self, hop: int, into: Tensor, then: Callable[[], None]) -> None:
        def done(work: Work) -> None:
            try:
                if work.error is not None:
                    raise work.error
                then()
            except Exception as error:
                self._fail(error)

        tag = Tag(self._stream, self._number, hop)
        self._mesh.recv(self._peer, tag, into).add_done_callback(done)

    def _receive_frame(self) -> None:
        frame = torch.empty(_FRAME_BYTES, dtype=torch.uint8)
        self._receive(0, frame, lambda: self._frame_arrived(bytes(frame.numpy())))

    def _frame_arrived(self, frame: bytes) -> None:
        self._began_s = time.perf_counter()
        (length,) = _LENGTH.unpack_from(frame)
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"rank {self._peer} sent a message of {length} bytes")
        inline = frame[_LENGTH.size : _LENGTH.size + length]
        if length <= _INLINE_BYTES:
            self._data_arrived(inline)
            return
        rest = torch.empty(length - _INLINE_BYTES, dtype=torch.uint8)
        self._receive(1, rest, lambda: self._data_arrived(inline + bytes(rest.numpy())))

    def _data_arrived(self, data: bytes) -> None:
        message, tensor = self._decode(data)
        if tensor is None or not tensor.numel():
            self._complete(message, tensor)
        else:
            self._receive(2, tensor, lambda: self._complete(message, tensor))

    def _complete(self, message: _M, tensor: Tensor | None) -> None:
        self._number += 1
        self._times.network_s += time.perf_counter() - self._began_s
        if self._deliver(message, tensor):
            self._receive_frame()


class PipelineHead:
    """Rank 0's end: runs the first stage, if it holds layers, and receives the results of the last
    one.

    `on_result` gets every BatchResult in the order of batches, None when all stages have ended,
    or the error of a lost peer; on the I/O thread, or on the caller's if there is one stage."""

    def __init__(
        self,
        mesh: Mesh,
        stages: list[int],
        runner: StageRunner | None,
        times: StageTimes,
        on_result: Callable[[BatchResult | BaseException | None], None],
    ) -> None:
        """`stages` are the ranks that hold layers, in order; this rank is the first, with a
        `runner`, or none of them."""
        if (runner is None) == (mesh.rank in stages) or mesh.rank in stages[1:]:
            raise SmolrunError(f"rank {mesh.rank} schedules; it may only be the first of {stages}")
        self._mesh = mesh
        self._others = [rank for rank in stages if rank != mesh.rank]
        self._runner, self._times, self._on_result = runner, times, on_result
        self._number = 0
        if self._others:
            decoder = msgspec.msgpack.Decoder(BatchResult | None)
            MessageReceiver(
                mesh,
                stages[-1],
                Stream.SERVING_RESULTS,
                lambda data: (decoder.decode(data), None),
                self._deliver,
                on_result,
                times,
            )

    def start(self, batch: Batch, *, with_stats: bool = False) -> None:
        """Run a batch on the first stage and send it on; blocks while this rank computes."""
        stages: list[StageStats] | None = [] if with_stats else None
        if self._runner is None:
            self._send(StagePlan(batch, stages), None)
            return
        output = run_timed(self._runner, self._times, batch, None)
        if stages is not None:
            stages.append(self._times.stats(self._mesh.bytes_sent))
        if isinstance(output, BatchResult):
            self._on_result(msgspec.structs.replace(output, stages=stages or []))
        else:
            self._send(StagePlan(batch, stages), output)

    def stop(self) -> None:
        """Let the stages end, in order; no batch may be under way: a stage that has ended takes
        its part of large tensors with it."""
        if self._others:
            self._send(StagePlan(None), None)
        else:
            self._on_result(None)

    def waited(self, seconds: float) -> None:
        """Count time in which this stage had nothing to compute."""
        self._times.wait_s += seconds

    def _send(self, plan: StagePlan, hidden_TD: Tensor | None) -> None:
        data = msgspec.msgpack.encode(plan)
        target = self._others[0]
        send_message(self._mesh, target, Stream.SERVING_BATCHES, self._number, data, hidden_TD)
        self._number += 1

    def _deliver(self, result: BatchResult | None, _: Tensor | None) -> bool:
        self._on_result(result)
        return result is not None


def run_stage(mesh: Mesh, stages: list[int], runner: StageRunner, times: StageTimes) -> None:
    """The loop of every other stage, until rank 0 stops the pipeline; blocks. Raises PeerLost."""
    arrived: queue.SimpleQueue[tuple[StagePlan, Tensor | None] | BaseException] = (
        queue.SimpleQueue()
    )
    index, is_last = stages.index(mesh.rank), mesh.rank == stages[-1]
    source = stages[index - 1] if index else 0
    _receive_plans(mesh, source, runner, arrived, times, has_hidden=index > 0)
    target = 0 if is_last else stages[index + 1]
    stream = Stream.SERVING_RESULTS if is_last else Stream.SERVING_BATCHES
    for number in itertools.count():
        began = time.perf_counter()
        message = arrived.get()
        times.wait_s += time.perf_counter() - began
        if isinstance(message, BaseException):
            raise message
        plan, hidden_TD = message
        answer: StagePlan | BatchResult | None = None if is_last else plan
        if plan.batch is not None:
            output = run_timed(runner, times, plan.batch, hidden_TD)
            figures = plan.stages
            if figures is not None:
                figures = [*figures, times.stats(mesh.bytes_sent)]
            if isinstance(output, BatchResult):
                answer, hidden_TD = msgspec.structs.replace(output, stages=figures or []), None
            else:
                answer, hidden_TD = StagePlan(plan.batch, figures), output
        send_message(mesh, target, stream, number, msgspec.msgpack.encode(answer), hidden_TD)
        if plan.batch is None:
            return


def _receive_plans(
    mesh: Mesh,
    source: int,
    runner: StageRunner,
    arrived: queue.SimpleQueue[tuple[StagePlan, Tensor | None] | BaseException],
    times: StageTimes,
    *,
    has_hidden: bool,
) -> None:
    """Receive plans and hidden states of the stage before into a queue; does not block."""
    decoder = msgspec.msgpack.Decoder(StagePlan)

    def decode(data: bytes) -> tuple[StagePlan, Tensor | None]:
        plan = decoder.decode(data)
        if plan.batch is None:
            return plan, None
        tokens = len(plan.batch.token_ids)
        if tokens > runner.max_tokens or tokens != sum(row.count for row in plan.batch.rows):
            raise ProtocolError(f"rank {source} sent a batch of {tokens} tokens")
        shape = (tokens, runner.width)
        return plan, torch.empty(shape, dtype=runner.dtype) if has_hidden else None

    def deliver(plan: StagePlan, hidden_TD: Tensor | None) -> bool:
        arrived.put((plan, hidden_TD))
        return plan.batch is not None

    MessageReceiver(mesh, source, Stream.SERVING_BATCHES, decode, deliver, arrived.put, times)
