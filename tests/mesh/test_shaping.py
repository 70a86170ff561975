"""Shaped links: token bucket and delay queue by themselves, and over real sockets."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch

from smolrun.collectives.api import new_group
from smolrun.mesh.link import Pipe, Throttled
from smolrun.mesh.mesh import Mesh
from smolrun.mesh.shaping import DelayQueue, Shape, ShapedPipe, TokenBucket
from smolrun.testing import run_ranks


@pytest.mark.parametrize("seed", range(20))
def test_a_bucket_never_gives_more_than_rate_and_burst_and_wastes_nothing_when_asked(seed: int):
    dice = random.Random(seed)
    bucket, now, passed = TokenBucket(1000.0, 300), 5.0, 0
    for _ in range(200):
        now += dice.choice([0.0, 0.001, 0.05, 0.2])
        allowed = bucket.allowed(now)
        assert 0 <= allowed <= 300
        bucket.take(allowed)
        passed += allowed
        assert passed <= 300 + 1000.0 * (now - 5.0) + 1
    greedy = TokenBucket(1000.0, 300)
    greedy.allowed(0.0)
    taken = 0
    for tick in range(1, 1001):  # asked every 10 ms, well within the burst
        count = greedy.allowed(tick / 100)
        greedy.take(count)
        taken += count
    assert taken == pytest.approx(300 + 9_990, abs=2)


def test_a_bucket_allows_the_bytes_after_its_wait_time():
    bucket = TokenBucket(1000.0, 300)
    bucket.take(bucket.allowed(0.0))
    wait_s = bucket.wait_s(100)
    assert wait_s == pytest.approx(0.1)
    assert bucket.allowed(wait_s * 0.99) < 100 <= bucket.allowed(wait_s + 1e-9)
    assert bucket.wait_s(10_000) <= 0.3, "more than a burst never comes at once"


def test_a_clock_that_does_not_move_gives_nothing():
    bucket = TokenBucket(1000.0, 300)
    bucket.take(bucket.allowed(1.0))
    assert [bucket.allowed(1.0), bucket.allowed(0.5)] == [0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_a_delay_changes_when_but_neither_what_nor_in_which_order(seed: int):
    dice = random.Random(seed)
    queue, sent, got, entered = DelayQueue(0.5), bytearray(), bytearray(), []
    now = 0.0
    while len(got) < 2000:
        now += dice.random() * 0.1
        if len(sent) < 2000:
            data = dice.randbytes(dice.randrange(1, 100))
            queue.put(data, now)
            sent += data
            entered += [now] * len(data)
        buffer = bytearray(dice.randrange(1, 200))
        count = queue.take_into(memoryview(buffer), now)
        got += buffer[:count]
        assert all(entered[i] + 0.5 <= now for i in range(len(got) - count, len(got)))
        if queue:
            due = now + queue.wait_s(now)
            assert due >= now and (count == len(buffer) or due > now)
    assert bytes(got) == bytes(sent[: len(got)])


class Scripted:
    """A pipe that has bytes to read, and takes all that it is given."""

    def __init__(self, data: bytes = b"") -> None:
        self.data, self.sent, self.is_over = bytearray(data), bytearray(), False

    def fileno(self) -> int:
        return 0

    def send(self, buffers: list[memoryview]) -> int:
        for buffer in buffers:
            self.sent += buffer
        return sum(len(buffer) for buffer in buffers)

    def recv_into(self, buffer: memoryview) -> int:
        if not self.data:
            if self.is_over:
                return 0
            raise BlockingIOError
        count = min(len(buffer), len(self.data))
        buffer[:count] = self.data[:count]
        del self.data[:count]
        return count

    def end(self) -> None: ...

    def close(self) -> None: ...


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def shaped(
    pipe: Scripted, *, delay_s: float = 0.0, rate: float | None = None
) -> tuple[ShapedPipe, Clock]:
    clock = Clock()
    buckets = [TokenBucket(rate, 40_000) if rate else None for _ in range(2)]
    return ShapedPipe(pipe, buckets[0], buckets[1], delay_s, clock), clock


def test_a_pipe_sends_what_the_bucket_allows_and_raises_throttled():
    inner = Scripted()
    pipe, clock = shaped(inner, rate=1e6)
    data = memoryview(bytes(100_000))
    assert pipe.send([data[:10], data[10:]]) == 40_000
    with pytest.raises(Throttled) as pause:
        pipe.send([data[40_000:]])
    assert pause.value.is_full and pause.value.after_s == pytest.approx(16_384 / 1e6)
    clock.now += pause.value.after_s + 1e-6
    assert pipe.send([data[40_000:]]) in (16_384, 16_385)


def test_input_is_delayed_and_the_end_comes_last():
    inner = Scripted(b"abc")
    pipe, clock = shaped(inner, delay_s=0.25)
    buffer = memoryview(bytearray(10))
    with pytest.raises(Throttled) as pause:
        pipe.recv_into(buffer)
    assert pause.value.after_s == pytest.approx(0.25)
    assert not pause.value.is_full, "what comes meanwhile has its own delay from its own arrival"
    inner.is_over = True
    with pytest.raises(Throttled) as pause:
        pipe.recv_into(buffer)
    assert pause.value.is_full, "a socket at its end would be readable all the time"
    clock.now += 0.25
    assert pipe.recv_into(buffer) == 3 and bytes(buffer[:3]) == b"abc"
    assert pipe.recv_into(buffer) == 0


def test_without_input_a_pipe_waits_for_the_selector():
    pipe, _ = shaped(Scripted(), delay_s=0.25, rate=1e6)
    with pytest.raises(BlockingIOError) as pause:
        pipe.recv_into(memoryview(bytearray(10)))
    assert not isinstance(pause.value, Throttled)


def shapes(mbps: float | None, latency_ms: float) -> Callable[[int], Callable[..., Pipe]]:
    made: dict[int, Shape] = {}
    return lambda rank: made.setdefault(rank, Shape(mbps, latency_ms)).wrap


def seconds(size: int, world_size: int, mbps: float | None, latency_ms: float, kind: str) -> float:
    """The best of three all_reduces of so many bytes, and all of them right."""

    def rank_main(mesh: Mesh) -> float:
        collectives = new_group(mesh)
        best = float("inf")
        for _ in range(3):
            tensor = torch.full((size // 4,), float(mesh.rank + 1))
            collectives.barrier()
            began = time.perf_counter()
            collectives.all_reduce(tensor)
            best = min(best, time.perf_counter() - began)
            assert tensor.unique().tolist() == [world_size * (world_size + 1) / 2]
        return best

    return max(run_ranks(world_size, rank_main, kind=kind, wrap=shapes(mbps, latency_ms)))


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["tcp", "tls"])
@pytest.mark.parametrize("latency_ms", [0.0, 4.0])
def test_an_all_reduce_takes_as_long_as_the_bandwidth_allows(kind: str, latency_ms: float):
    size, world_size = 1_500_000, 3
    moved = size * 2 * (world_size - 1) / world_size
    ideal_s = moved / (100e6 / 8 * 1448 / 1514)  # 0.17 s
    took_s = seconds(size, world_size, 100, latency_ms, kind)
    # A burst of 60 kB goes free, three processors' worth of threads share two cores.
    assert 0.9 * ideal_s < took_s < 1.6 * ideal_s + 8 * latency_ms / 1000


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_no_link_exceeds_its_bandwidth(kind: str):
    size, world_size = 300_000, 3
    moved = size * 2 * (world_size - 1) / world_size
    ideal_s = (moved - 60_000) / (100e6 / 8)  # a burst of 60 kB goes free
    assert seconds(size, world_size, 100, 0.0, kind) > ideal_s


def test_latency_applies_to_every_message():
    def rank_main(mesh: Mesh) -> float:
        collectives = new_group(mesh)
        collectives.barrier()
        began = time.perf_counter()
        for _ in range(5):
            collectives.all_reduce(torch.ones(4))
        return (time.perf_counter() - began) / 5

    slow = min(run_ranks(2, rank_main, kind="tcp", wrap=shapes(None, 20.0)))
    assert slow >= 0.02, "one exchange between two ranks is one way"
