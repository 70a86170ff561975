"""Chains of schedules: in order, few at one time, however many there are, and loud when one
breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from smolrun.collectives.api import Collectives
from smolrun.collectives.chain import Chain, Phase
from smolrun.collectives.schedule import even_ranges
from smolrun.collectives.scheduled_collectives import ScheduledCollectives
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks


def gather_twice(collectives: Collectives, number: int, events: list[str]) -> Chain:
    """Gathers everybody's rank, then the sums of that."""
    size, index = collectives.size, collectives.index
    value = float(index)
    for phase in range(2):
        events.append(f"begin {number}" if phase == 0 else f"half {number}")
        row = torch.zeros(size)
        row[index] = value
        places = even_ranges(size, size)
        yield Phase("all_gather", row, places, row, places)
        value = row.sum().item()
    events.append(f"end {number} {value:g}")


@pytest.mark.parametrize("kind", ["memory", "tcp"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_chains_start_in_order_and_few_run_at_one_time(world_size: int, kind: str) -> None:
    count = 400  # more than a deep stack would bear, if one called the next

    def rank_main(mesh: Mesh) -> list[str]:
        collectives, events = ScheduledCollectives(mesh), list[str]()
        chains = [gather_twice(collectives, number, events) for number in range(count)]
        works = [collectives.run_chains("test", chains[part::2], 2) for part in range(2)]
        collectives.barrier()  # other operations may follow at once
        for work in works:
            work.wait()
        return events

    sums = world_size * (world_size - 1) // 2 * world_size
    for events in run_ranks(world_size, rank_main, kind=kind):
        begun = [event for event in events if event.startswith("begin")]
        assert begun == [f"begin {n}" for part in range(2) for n in range(count)[part::2]]
        assert sum(event.endswith(f" {sums}") for event in events if "end" in event) == count
        open_now = most = 0
        for event in events:
            open_now += event.startswith("begin") - event.startswith("end")
            most = max(most, open_now)
        assert most <= 4


def test_a_chain_that_raises_fails_the_work() -> None:
    def broken() -> Iterator[Phase]:
        raise ValueError("what it was told makes no sense")
        yield

    def rank_main(mesh: Mesh) -> None:
        with pytest.raises(ValueError, match="makes no sense"):
            ScheduledCollectives(mesh).run_chains("test", [broken()], 1).wait()

    run_ranks(2, rank_main)
