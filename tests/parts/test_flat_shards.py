"""Cuts fall anywhere, and every element has exactly one owner."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smolrun.collectives.api import new_group
from smolrun.mesh.mesh import Mesh
from smolrun.parts.flat_shards import ShardedBucket
from smolrun.parts.gradient_reducer import GradientReducer
from smolrun.parts.placement import memory_shares
from smolrun.parts.quantization import Quantization
from smolrun.parts.reduce_scatter_buckets import ReduceScatterBuckets
from smolrun.testing import run_ranks

SHAPES = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=6)
WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


def named(shapes: list[tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (f"p{number}", nn.Parameter(torch.randn(shape, generator=generator)))
        for number, shape in enumerate(shapes)
    ]


@given(SHAPES, WEIGHTS)
def test_every_element_is_owned_once(shapes: list[tuple[int, ...]], weights: list[float]) -> None:
    parameters = named(shapes)
    whole = {name: torch.full((p.numel(),), torch.nan) for name, p in parameters}
    owned = dict.fromkeys(whole, 0)
    for index in range(len(weights)):
        bucket = ShardedBucket(parameters, weights, index)
        bucket.load_shard(lambda name, parameter: parameter.detach())
        for part in bucket.slices:
            assert part.values.ndim == min(2, max(1, len(part.shape)))
            assert (
                part.values.untyped_storage().data_ptr()
                == bucket.shard.untyped_storage().data_ptr()
            )
            whole[part.name][part.start : part.stop] = part.values.detach().flatten()
            owned[part.name] += part.values.numel()
    for name, parameter in parameters:
        assert owned[name] == parameter.numel()
        assert torch.equal(whole[name].view_as(parameter), parameter)


@given(SHAPES, WEIGHTS)
def test_a_replica_moves_in_without_changing(
    shapes: list[tuple[int, ...]], weights: list[float]
) -> None:
    parameters = named(shapes)
    before = [p.detach().clone() for _, p in parameters]
    bucket = ShardedBucket(parameters, weights, 0)
    flat = bucket.flatten_parameters()
    assert all(torch.equal(p, old) for (_, p), old in zip(parameters, before, strict=True))
    flat.zero_()
    assert all(not p.any() for _, p in parameters)
    assert not bucket.shard.any()


def test_memory_shares_are_those_of_ranks_where_all_are_known() -> None:
    hosts = [{"memory_gb": 16.0, "ranks": 2}, {"memory_gb": 4.0, "ranks": 1}]
    assert memory_shares(hosts) == (8.0, 8.0, 4.0)
    assert memory_shares([*hosts, {"memory_gb": None, "ranks": 1}]) == ()
    assert memory_shares(None) == memory_shares([]) == ()


@pytest.mark.parametrize("max_live", [1, 2, 100])
def test_no_more_buckets_are_alive_than_allowed(max_live: int) -> None:
    """Layers of one bucket each; looked at whenever a gradient comes."""

    torch.manual_seed(0)  # here, as ranks are threads that share one generator
    first = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(8)))

    def rank_main(mesh: Mesh) -> tuple[int, list[torch.Tensor]]:
        model = copy.deepcopy(first)
        buckets = [
            ShardedBucket([(name, p)], [1.0, 2.0, 1.0], mesh.rank)
            for name, p in reversed(list(model.named_parameters()))
        ]
        for bucket in buckets:
            bucket.flatten_parameters()
        collectives = new_group(mesh)
        passing = ReduceScatterBuckets(
            buckets,
            collectives,
            GradientReducer(collectives, Quantization()),
            slots=1,
            max_live=max_live,
            wait=lambda work: work.wait(),
        )
        most = [0]

        def look(_: torch.Tensor) -> None:
            most[0] = max(most[0], len(passing._filling) + len(passing._leaving))

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(look)
        passing.begin(0)
        for _ in range(2):
            passing.begin_backward()
            model(torch.ones(2, 6)).sum().backward()
            passing.end_backward()
        return most[0], [own.clone() for own in passing.finish(0)]

    told = run_ranks(3, rank_main)
    assert max(most for most, _ in told) <= max_live
    assert max_live > 1 or max(most for most, _ in told) == 1
    first(torch.ones(2, 6)).sum().backward()
    for number, parameter in enumerate(reversed(list(first.parameters()))):
        assert parameter.grad is not None
        total = torch.cat([sums[number] for _, sums in told])
        assert torch.allclose(total, 6 * parameter.grad.flatten(), rtol=1e-5)
