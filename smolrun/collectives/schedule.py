"""What a schedule is: the list of hops one rank makes during a collective. Pure data, so it can be
drawn, costed and tested.

Ranks are counted within the group here (index 0 .. size-1), and data is counted in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

Range = tuple[int, int]  # elements [start, stop)


class Hop(NamedTuple):
    """One turn of one rank: send a chunk, receive a chunk, or both. None means: not in this hop."""

    to: int | None = None
    send: int = 0  # chunk to send
    source: int | None = None
    receive: int = 0  # chunk to receive
    adds: bool = False  # combine what arrives with what is there, instead of replacing it
    needs: int = 0  # the send starts when the receives of the first `needs` hops are done


Schedule = list[Hop]


def even_ranges(total: int, parts: int) -> list[Range]:
    """`total` elements cut into `parts` contiguous ranges whose sizes differ by at most one."""
    size, rest = divmod(total, parts)
    starts = [index * size + min(index, rest) for index in range(parts + 1)]
    return list(pairwise(starts))


def ranges_of(sizes: Sequence[int]) -> list[Range]:
    """Contiguous ranges of the given sizes."""
    ranges: list[Range] = []
    stop = 0
    for size in sizes:
        ranges.append((stop, stop + size))
        stop += size
    return ranges


def elements_sent(schedule: Schedule, ranges: Sequence[Range]) -> int:
    """How many elements a rank sends: the cost of a schedule, read off the schedule itself."""
    return sum(ranges[hop.send][1] - ranges[hop.send][0] for hop in schedule if hop.to is not None)


def simulate(
    schedules: Sequence[Schedule],
    chunks: list[list[float]],
    combine: Callable[[float, float], float],
) -> list[list[float]]:
    """Runs the schedules of all ranks on plain numbers, `chunks[rank][chunk]`; for tests and
    pictures.

    Raises RuntimeError when no rank can go on, that is, when a real run would hang.
    """
    next_send = [0] * len(schedules)
    received = [0] * len(schedules)
    on_the_way: dict[tuple[int, int, int], float] = {}  # (from, to, hop) -> value
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
                    on_the_way[rank, hop.to, next_send[rank]] = chunks[rank][hop.send]
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
                    if key not in on_the_way:
                        break
                    value = on_the_way.pop(key)
                    chunks[rank][hop.receive] = (
                        combine(chunks[rank][hop.receive], value) if hop.adds else value
                    )
                received[rank] += 1
                is_moving = True
    if (
        any(done < len(schedule) for done, schedule in zip(received, schedules, strict=True))
        or on_the_way
    ):
        raise RuntimeError(
            "the schedules do not fit together: somebody waits forever or is never heard"
        )
    return chunks


def partner_hop(sender: Schedule, receiver_index: int, receiver: Schedule, hop_index: int) -> int:
    """The sender's hop that feeds a receiver's hop: the n-th send to it feeds its n-th receive from
    the sender."""
    source = receiver[hop_index].source
    nth = sum(1 for hop in receiver[:hop_index] if hop.source == source)
    sends = [index for index, hop in enumerate(sender) if hop.to == receiver_index]
    return sends[nth] if nth < len(sends) else -1
