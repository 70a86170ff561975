"""Schedules are data: checked for every size and root without a single thread or socket."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import pytest

from smolrun.collectives.schedule import (
    Schedule,
    direct_all_gather,
    direct_all_to_all,
    dissemination_barrier,
    elements_sent,
    even_ranges,
    ranges_of,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    star_gather,
    star_scatter,
    tree_broadcast,
)

SIZES = range(1, 12)


def simulate(
    schedules: Sequence[Schedule],
    chunks: list[list[float]],
    combine: Callable[[float, float], float],
) -> list[list[float]]:
    """Runs the schedules of all ranks on plain numbers, `chunks[rank][chunk]`.

    Raises RuntimeError when no rank can continue, that is, when a real run would hang.
    """
    next_send = [0] * len(schedules)
    received = [0] * len(schedules)
    in_flight: dict[tuple[int, int, int], float] = {}  # (from, to, hop) -> value
    is_moving = True
    while is_moving:
        is_moving = False
        for rank, schedule in enumerate(schedules):
            while (
                next_send[rank] < len(schedule)
                and schedule[next_send[rank]].needs <= received[rank]
            ):
                hop = schedule[next_send[rank]]
                if hop.to is not None:
                    in_flight[rank, hop.to, next_send[rank]] = chunks[rank][hop.send]
                next_send[rank] += 1
                is_moving = True
            while received[rank] < len(schedule):
                hop = schedule[received[rank]]
                if hop.source is not None:
                    key = (
                        hop.source,
                        rank,
                        partner_hop(schedules[hop.source], rank, schedule, received[rank]),
                    )
                    if key not in in_flight:
                        break
                    value = in_flight.pop(key)
                    chunks[rank][hop.receive] = (
                        combine(chunks[rank][hop.receive], value) if hop.adds else value
                    )
                received[rank] += 1
                is_moving = True
    if (
        any(done < len(schedule) for done, schedule in zip(received, schedules, strict=True))
        or in_flight
    ):
        raise RuntimeError(
            "the schedules do not match: a receive has no send, or a send no receive"
        )
    return chunks


def partner_hop(sender: Schedule, receiver_index: int, receiver: Schedule, hop_index: int) -> int:
    """The sender's hop that feeds a receiver's hop: the n-th send to it feeds its n-th receive from
    the sender."""
    source = receiver[hop_index].source
    nth = sum(1 for hop in receiver[:hop_index] if hop.source == source)
    sends = [index for index, hop in enumerate(sender) if hop.to == receiver_index]
    return sends[nth] if nth < len(sends) else -1


@pytest.mark.parametrize("size", SIZES)
def test_ring_all_reduce_sums_everything_everywhere(size: int) -> None:
    chunks = [[float(100**chunk * (rank + 1)) for chunk in range(size)] for rank in range(size)]
    expected = [100.0**chunk * sum(range(1, size + 1)) for chunk in range(size)]
    result = simulate([ring_all_reduce(rank, size) for rank in range(size)], chunks, operator.add)
    assert all(row == pytest.approx(expected) for row in result)
    assert all(row == result[0] for row in result), "all ranks end with the same bytes"


@pytest.mark.parametrize("size", SIZES)
def test_ring_reduce_scatter_gives_each_rank_its_own_chunk(size: int) -> None:
    chunks = [[float(rank + 1)] * size for rank in range(size)]
    result = simulate(
        [ring_reduce_scatter(rank, size) for rank in range(size)], chunks, operator.add
    )
    assert [result[rank][rank] for rank in range(size)] == [sum(range(1, size + 1))] * size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("schedule", [ring_all_gather, direct_all_gather])
def test_all_gather(size: int, schedule: object) -> None:
    chunks = [
        [float(rank) if chunk == rank else -1.0 for chunk in range(size)] for rank in range(size)
    ]
    result = simulate([schedule(rank, size) for rank in range(size)], chunks, operator.add)  # type: ignore[operator]
    assert result == [[float(chunk) for chunk in range(size)]] * size


@pytest.mark.parametrize("size", SIZES)
def test_trees_and_stars_for_every_root(size: int) -> None:
    for root in range(size):
        at_root = [[7.0 if rank == root else 0.0] for rank in range(size)]
        assert (
            simulate([tree_broadcast(r, size, root) for r in range(size)], at_root, operator.add)
            == [[7.0]] * size
        )
        own = [
            [float(rank) if chunk == rank else -1.0 for chunk in range(size)]
            for rank in range(size)
        ]
        gathered = simulate([star_gather(r, size, root) for r in range(size)], own, operator.add)
        assert gathered[root] == [float(chunk) for chunk in range(size)]
        full = [
            [float(chunk) if rank == root else -1.0 for chunk in range(size)]
            for rank in range(size)
        ]
        scattered = simulate([star_scatter(r, size, root) for r in range(size)], full, operator.add)
        assert [scattered[rank][rank] for rank in range(size)] == [
            float(rank) for rank in range(size)
        ]


@pytest.mark.parametrize("size", SIZES)
def test_a_broadcast_takes_logarithmic_rounds(size: int) -> None:
    most = max(
        sum(hop.to is not None for hop in tree_broadcast(rank, size, 0)) for rank in range(size)
    )
    assert most == (size - 1).bit_length()


@pytest.mark.parametrize("size", SIZES)
def test_after_a_barrier_each_rank_has_a_signal_of_all(size: int) -> None:
    heard = [{rank} for rank in range(size)]
    schedules = [dissemination_barrier(rank, size) for rank in range(size)]
    for hop in range((size - 1).bit_length()):
        before = [set(ranks) for ranks in heard]
        for rank in range(size):
            source = schedules[rank][hop].source
            assert (
                source is not None
                and schedules[source][hop].to == rank
                and schedules[rank][hop].needs == hop
            )
            heard[rank] |= before[source]
    assert heard == [set(range(size))] * size


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_has_every_pair_once(size: int) -> None:
    for rank in range(size):
        hops = direct_all_to_all(rank, size)
        assert sorted(hop.to for hop in hops) == [r for r in range(size) if r != rank]  # type: ignore[type-var]
        assert all(hop.send == hop.to and hop.receive == hop.source for hop in hops)


@pytest.mark.parametrize("elements", [0, 1, 7, 100, 12_345])
@pytest.mark.parametrize("size", SIZES)
def test_ring_moves_the_least_possible(size: int, elements: int) -> None:
    ranges = even_ranges(elements, size)
    sent = [elements_sent(ring_all_reduce(rank, size), ranges) for rank in range(size)]
    assert sum(sent) == 2 * (size - 1) * elements
    assert max(sent) - min(sent) <= 2 * size


def test_ranges() -> None:
    assert even_ranges(7, 3) == [(0, 3), (3, 5), (5, 7)]
    assert ranges_of([2, 0, 3]) == [(0, 2), (2, 2), (2, 5)]


def test_simulate_finds_a_hang() -> None:
    broken = [ring_all_reduce(0, 3), ring_all_reduce(1, 3), ring_all_reduce(2, 3)[:-1]]
    with pytest.raises(RuntimeError, match="do not match"):
        simulate(broken, [[0.0] * 3 for _ in range(3)], operator.add)
