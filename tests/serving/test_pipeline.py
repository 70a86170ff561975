"""Batches on their way: small and large ones arrive whole and in order, what does not fit is
refused, a lost stage is named."""

from __future__ import annotations

import queue
import time

import msgspec
import pytest
import torch
from torch import Tensor

from smolrun.errors import PeerLost, ProtocolError, SmolrunError
from smolrun.mesh.memory import MemoryWorld
from smolrun.mesh.mesh import Mesh
from smolrun.mesh.streams import Stream
from smolrun.parts.step_clock import EmulatedPace
from smolrun.serving.batch import Batch, BatchResult, Row, Sampled
from smolrun.serving.engine import Engine
from smolrun.serving.messages import StageStats
from smolrun.serving.pipeline import (
    MAX_MESSAGE_BYTES,
    PipelineHead,
    StagePlan,
    run_stage,
    send_message,
)
from smolrun.serving.scheduler import Scheduler
from smolrun.serving.stage_runner import StageTimes, run_timed
from smolrun.testing import run_ranks
from tests.serving.fake_stage import VOCAB, FakeStage
from tests.serving.test_engine import CAPACITY, SLOTS, Client, request, run_engine, stats_of
from tests.waiting import SOON_S


class Adder:
    """Adds one to what came in; the last stage reports the sums of its rows' values."""

    dtype = torch.bfloat16
    max_tokens = 5000

    def __init__(self, width: int, *, is_last: bool) -> None:
        self.width, self._is_last = width, is_last

    def run(self, batch: Batch, hidden_TD: Tensor | None) -> Tensor | BatchResult:
        if hidden_TD is None:
            hidden_TD = torch.tensor(batch.token_ids, dtype=self.dtype)[:, None]
            hidden_TD = hidden_TD.repeat(1, self.width)
        hidden_TD = hidden_TD + 1
        if not self._is_last:
            return hidden_TD
        return BatchResult(batch.number, [Sampled(0, int(hidden_TD.float().sum()))])


def times_of(rank: int) -> StageTimes:
    return StageTimes(stats_of(rank))


@pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
def test_batches_of_any_size_arrive_whole_and_in_order(kind: str) -> None:
    # Plan and hidden states in one frame, in an eager tensor, and in a granted one.
    counts = [1, 1, 300, 4000, 1, 4000, 2]
    results: list[BatchResult] = []

    def work(mesh: Mesh) -> None:
        runner = Adder(16, is_last=mesh.rank == 2)
        if mesh.rank:
            run_stage(mesh, [0, 1, 2], runner, times_of(mesh.rank))
            return
        arrived: queue.SimpleQueue[BatchResult | BaseException | None] = queue.SimpleQueue()
        head = PipelineHead(mesh, [0, 1, 2], runner, times_of(0), arrived.put)
        for number, count in enumerate(counts):
            batch = Batch(number, [Row(0, 0, count, True)], [1] * count)
            head.start(batch, with_stats=number == 3)
        for _ in counts:
            result = arrived.get(timeout=SOON_S)
            assert isinstance(result, BatchResult), result
            results.append(result)
        head.stop()
        assert arrived.get(timeout=SOON_S) is None

    run_ranks(3, work, kind=kind)
    assert [result.number for result in results] == list(range(len(counts)))
    assert [result.sampled[0].token_id for result in results] == [n * 4 * 16 for n in counts]
    assert [len(result.stages) for result in results] == [0, 0, 0, 3, 0, 0, 0]
    assert [stage.rank for stage in results[3].stages] == [0, 1, 2]
    assert {stage.tokens for stage in results[3].stages} == {1 + 1 + 300 + 4000}
    assert all(stage.memory_bytes > 0 for stage in results[3].stages)
    if kind != "memory":  # there everything arrives at once
        assert all(stage.network_s > 0 for stage in results[3].stages[1:])


def test_one_stage_needs_no_peer() -> None:
    world = MemoryWorld(1)
    results: list[BatchResult | BaseException | None] = []
    head = PipelineHead(world.meshes[0], [0], Adder(1, is_last=True), times_of(0), results.append)
    head.start(Batch(0, [Row(0, 0, 2, True)], [1, 2]))
    head.stop()
    assert results == [BatchResult(0, [Sampled(0, 5)]), None]
    world.meshes[0].close()


@pytest.mark.parametrize(("stages", "has_runner"), [([1, 0], True), ([0, 1], False), ([1], True)])
def test_rank_0_is_the_first_stage_or_none(stages: list[int], has_runner: bool) -> None:
    world = MemoryWorld(2)
    runner = Adder(1, is_last=False) if has_runner else None
    with pytest.raises(SmolrunError, match="it may only be the first of"):
        PipelineHead(world.meshes[0], stages, runner, times_of(0), print)
    for mesh in world.meshes:
        mesh.close()


def _plan(tokens: int, counted: int) -> bytes:
    batch = Batch(0, [Row(0, 0, counted, True)], [1] * tokens)
    return msgspec.msgpack.encode(StagePlan(batch))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x93garbage", "Expected|Invalid|truncated"),
        (_plan(5001, 5001), "rank 0 sent a batch of 5001 tokens"),
        (_plan(3, 4), "rank 0 sent a batch of 3 tokens"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(data: bytes, sentence: str) -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            send_message(mesh, 1, Stream.SERVING_BATCHES, 0, data)
        else:
            with pytest.raises((ProtocolError, msgspec.DecodeError), match=sentence):
                run_stage(mesh, [0, 1], Adder(1, is_last=True), times_of(1))

    run_ranks(2, work)


def test_a_message_beyond_the_limit_is_refused() -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            send_message(mesh, 1, Stream.SERVING_BATCHES, 0, bytes(MAX_MESSAGE_BYTES + 1))
        else:
            with pytest.raises(ProtocolError, match=f"a message of {MAX_MESSAGE_BYTES + 1} bytes"):
                run_stage(mesh, [0, 1], Adder(1, is_last=True), times_of(1))

    run_ranks(2, work)


def test_an_idle_server_takes_no_cpu_and_has_no_time_limit() -> None:
    """The mesh's time limit passes while nothing is asked; then a request is answered."""
    used: list[float] = []  # CPU time of the engine's thread at each message

    def send(message: object) -> None:
        used.append(time.thread_time())
        client.messages.put(message)  # type: ignore[arg-type]

    scheduler = Scheduler(slots=SLOTS, capacity=CAPACITY, vocab_size=VOCAB, stages=2)
    client = Client(Engine(scheduler, send, max_message_bytes=10_000), 2)

    def script(client: Client) -> None:
        client.run(request("before", 3))
        count = len(used)
        time.sleep(1.0)
        assert len(used) == count
        client.run(request("after", 3))
        client.check(request("after", 3))
        assert used[count] - used[count - 1] < 0.2

    def work(mesh: Mesh) -> None:
        runner = FakeStage(mesh.rank, 2, slots=SLOTS, capacity=CAPACITY)
        if mesh.rank:
            run_stage(mesh, [0, 1], runner, times_of(1))
        else:
            head = PipelineHead(mesh, [0, 1], runner, times_of(0), client.engine.on_result)
            run_engine(client, head, script)

    run_ranks(2, work, kind="tcp", timeout_s=0.5)


def test_a_lost_stage_is_named_while_nothing_is_asked() -> None:
    """A receive is always posted, so rank 0 does not learn it from the next request."""
    world = MemoryWorld(2, elastic=True)
    arrived: queue.SimpleQueue[BatchResult | BaseException | None] = queue.SimpleQueue()
    PipelineHead(world.meshes[0], [0, 1], Adder(1, is_last=False), times_of(0), arrived.put)
    world.leave(1, "it was killed")
    error = arrived.get(timeout=SOON_S)
    assert isinstance(error, PeerLost) and error.rank == 1
    world.meshes[0].close()


def test_stage_times_are_those_of_the_stage() -> None:
    stage = StageStats(1, "h", 0, 3, weight_bytes=10, cache_bytes=20)
    times = StageTimes(stage, compute_s=0.5, wait_s=0.25, network_s=0.125, tokens=7)
    found = times.stats(99)
    assert found.memory_bytes > 10e6  # of this process
    assert msgspec.structs.replace(found, memory_bytes=0) == msgspec.structs.replace(
        stage, compute_s=0.5, wait_s=0.25, network_s=0.125, tokens=7, sent_bytes=99
    )


def test_a_stage_counts_its_tokens_and_emulates_a_slower_machine() -> None:
    class Busy(Adder):
        def run(self, batch: Batch, hidden_TD: Tensor | None) -> Tensor | BatchResult:
            began = time.thread_time()
            while time.thread_time() < began + 0.05:
                pass
            return super().run(batch, hidden_TD)

    times = StageTimes(stats_of(0), EmulatedPace(0.25))
    run_timed(Busy(1, is_last=True), times, Batch(0, [Row(0, 0, 3, True)], [1, 2, 3]), None)
    assert times.tokens == 3 and times.compute_s >= 0.2
