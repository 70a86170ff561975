"""Hashes see a single changed bit, and replicas that differ are made equal."""

from __future__ import annotations

import math

import pytest
import torch

from smolrun.collectives.api import new_group
from smolrun.mesh.mesh import Mesh, Work
from smolrun.parts.replicas import (
    broadcast_from,
    contents,
    first_difference,
    gather_hashes,
    parameter_hash,
    sync_replicas,
)
from smolrun.testing import run_ranks


def test_one_bit_changes_the_hash() -> None:
    tensor = torch.ones(1000)
    before = parameter_hash([tensor])
    tensor.view(torch.int32)[500] ^= 1
    assert parameter_hash([tensor]) != before


def test_replicas_that_differ_become_rank_0s() -> None:
    def rank_main(mesh: Mesh) -> tuple[list[float], list[float], list[str], float]:
        collectives = new_group(mesh)
        tensors = [torch.ones(3, 2), torch.full((2,), float(mesh.rank))]
        changed = sync_replicas(collectives, tensors)
        again = sync_replicas(collectives, tensors)
        return (
            changed,
            again,
            gather_hashes(collectives, parameter_hash(tensors)),
            tensors[1][0].item(),
        )

    for changed, again, hashes, value in run_ranks(3, rank_main):
        assert (changed, again, len(set(hashes)), value) == ([0, 1, 2], [], 1, 0.0)


def test_the_largest_difference_is_found_wherever_it_is() -> None:
    """In a later piece of a large tensor, of whole numbers, and where it is not a number."""
    large = torch.zeros(1 << 19)
    counts = torch.zeros(3, dtype=torch.int64)

    def rank_main(mesh: Mesh) -> list[float]:
        mine, whole = large.clone(), counts.clone()
        if mesh.rank == 1:
            mine[-1], whole[2] = 0.5, -7
        if mesh.rank == 2:
            mine[3] = math.nan
        return sync_replicas(new_group(mesh), [mine, whole, torch.zeros(0)])

    for found in run_ranks(3, rank_main):
        assert found[:2] == [0, 7]
        assert math.isnan(found[2])


def test_the_first_tensor_that_differs_is_named() -> None:
    def rank_main(mesh: Mesh) -> list[str]:
        tensors = {
            "weight": torch.ones(3),
            "mean": torch.zeros(2),
            "count": torch.tensor(mesh.rank),
        }
        collectives = new_group(mesh)
        found = [first_difference(collectives, tensors)]
        tensors["mean"] += float(mesh.rank == 2)
        found.append(first_difference(collectives, tensors))
        tensors.pop("mean"), tensors.pop("count")
        return [*found, first_difference(collectives, tensors)]

    assert run_ranks(3, rank_main) == [["count", "mean", ""]] * 3


def test_one_ranks_tensors_are_copied_to_all_whatever_their_types() -> None:
    values = [
        torch.tensor([True]),
        torch.tensor(7),
        torch.ones(2, 3, dtype=torch.float64).T,
        torch.zeros(0),
        torch.ones(5, dtype=torch.bfloat16),
    ]

    def rank_main(mesh: Mesh) -> list[torch.Tensor]:
        own = [value.clone() if mesh.rank == 1 else torch.zeros_like(value) for value in values]
        broadcast_from(new_group(mesh), 1, own, wait=Work.wait)
        return own

    for copied in run_ranks(3, rank_main):
        assert all(torch.equal(a, b) for a, b in zip(copied, values, strict=True))


@pytest.mark.parametrize("by_bytes", [True, False])
def test_contents_differ_where_a_tensor_was_changed(by_bytes: bool) -> None:
    same, written, replaced = (torch.tensor([math.nan, 1.0]) for _ in range(3))
    reshaped = torch.zeros(2)
    tensors = {"same": same, "written": written, "replaced": replaced, "reshaped": reshaped}
    before = contents(tensors, by_bytes=by_bytes)
    assert contents(tensors, by_bytes=by_bytes) == before, "NaN is not a change"
    written[1] = 2
    after = contents(
        {**tensors, "replaced": replaced + 1, "reshaped": reshaped.view(2, 1)}, by_bytes=by_bytes
    )
    assert {name for name in after if after[name] != before[name]} == {*tensors} - {"same"}
    assert after["reshaped"].layout != before["reshaped"].layout
