"""Quantized sums over both meshes: to the byte what twenty lines in one process give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smolrun.collectives.api import new_group
from smolrun.mesh.mesh import Mesh
from smolrun.parts.quantization import ErrorFeedback, Quantization, Quantizer
from smolrun.parts.quantized_all_reduce import QuantizedAllReduce
from smolrun.testing import run_ranks

KINDS = ["none", "int8", "fp16", "bf16"]
WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3, 4])
Ranges = list[tuple[int, int]]


def gradient(rank: int, step: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) * (rank + 1)


def even(size: int, parts: int) -> list[int]:
    return [size // parts + (index < size % parts) for index in range(parts)]


def simulated(
    quantizer: Quantizer, inputs: list[Tensor], residuals: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """The sums before and after they travel back, in one process; replaces the residuals."""

    def rounded(numbers: Tensor) -> Tensor:
        into = torch.empty_like(numbers)
        quantizer.decode(quantizer.encode(numbers), into)
        return into

    given = [one + other for one, other in zip(inputs, residuals, strict=True)]
    sums, results, start = [], [], 0
    for owner, size in enumerate(sizes):
        own = slice(start, start := start + size)
        told = [x[own] if rank == owner else rounded(x[own]) for rank, x in enumerate(given)]
        total = sum(told, torch.zeros_like(told[0]))
        result = total if len(inputs) == 1 else rounded(total)
        for rank, residual in enumerate(residuals):
            residual[own] = total - result if rank == owner else given[rank][own] - told[rank]
        sums.append(total)
        results.append(result)
    return torch.cat(sums), torch.cat(results)


ON_TORCH = pytest.mark.parametrize("mesh_kind", ["memory", "torch"])


@ON_TORCH
@WORLDS
@pytest.mark.parametrize("kind", KINDS)
def test_all_reduce_is_the_simulation_to_the_byte(
    kind: str, world_size: int, mesh_kind: str
) -> None:
    size, steps = 1013, 5
    quantizer = Quantization(kind, block=64).quantizer()

    def rank_main(mesh: Mesh) -> tuple[list[Tensor], Tensor]:
        sums = QuantizedAllReduce(new_group(mesh), quantizer)
        feedback, results = ErrorFeedback(size), []
        for step in range(steps):
            flat = gradient(mesh.rank, step, size)
            sums.all_reduce(flat, feedback).wait()
            feedback.settle(is_kept=True)
            results.append(flat)
        return results, feedback.residual

    ranks = run_ranks(world_size, rank_main, kind=mesh_kind)
    residuals = [torch.zeros(size) for _ in range(world_size)]
    for step in range(steps):
        inputs = [gradient(rank, step, size) for rank in range(world_size)]
        _, expected = simulated(quantizer, inputs, residuals, even(size, world_size))
        for results, _ in ranks:
            assert torch.equal(results[step], expected)
    for (_, residual), expected in zip(ranks, residuals, strict=True):
        assert torch.equal(residual, expected)
    assert any(residual.any() for residual in residuals) == (kind != "none" and world_size > 1)


@ON_TORCH
@WORLDS
@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_reduce_scatter_is_the_first_half_of_it(kind: str, world_size: int, mesh_kind: str) -> None:
    sizes = [700, 0, 3, 200][:world_size]
    quantizer = Quantization(kind, block=64).quantizer()

    def rank_main(mesh: Mesh) -> tuple[Tensor, Tensor]:
        sums, feedback = QuantizedAllReduce(new_group(mesh), quantizer), ErrorFeedback(sum(sizes))
        start = sum(sizes[: mesh.rank])
        for step in range(3):  # several in one step: each finds what the last has left
            flat = gradient(mesh.rank, step, sum(sizes))
            work = sums.reduce_scatter(flat, sizes, feedback)
        work.wait()
        feedback.settle(is_kept=True)
        return flat[start : start + sizes[mesh.rank]], feedback.residual

    ranks = run_ranks(world_size, rank_main, kind=mesh_kind)
    residuals = [torch.zeros(sum(sizes)) for _ in range(world_size)]
    for step in range(3):
        inputs = [gradient(rank, step, sum(sizes)) for rank in range(world_size)]
        total, _ = simulated(quantizer, inputs, residuals, sizes)
        start = 0
        for rank, size in enumerate(sizes):  # the owner has its sum as it is
            residuals[rank][start : start + size] = 0
            start += size
    assert torch.equal(torch.cat([own for own, _ in ranks]), total)
    for (_, residual), expected in zip(ranks, residuals, strict=True):
        assert torch.equal(residual, expected)


@pytest.mark.parametrize("kind", ["memory", "tcp", "torch"])
def test_large_tensors_go_in_parts_and_lose_nothing(kind: str) -> None:
    """What came out of all steps and what is kept, together, is what went in."""
    size, steps, world_size = 100_003, 6, 3

    def rank_main(mesh: Mesh) -> tuple[Tensor, Tensor]:
        sums = QuantizedAllReduce(new_group(mesh), Quantization("int8").quantizer(), part=9_000)
        feedback = [ErrorFeedback(size, torch.float64) for _ in range(2)]
        total = torch.zeros(size, dtype=torch.float64)
        for step in range(steps):  # two at one time, as buckets are
            flats = [gradient(mesh.rank, 2 * step + i, size, torch.float64) for i in range(2)]
            works = [sums.all_reduce(f, b) for f, b in zip(flats, feedback, strict=True)]
            for work, flat, kept in zip(works, flats, feedback, strict=True):
                work.wait()
                kept.settle(is_kept=True)
                total += flat
        return total, feedback[0].residual + feedback[1].residual

    ranks = run_ranks(world_size, rank_main, kind=kind)
    assert torch.equal(ranks[0][0], ranks[1][0]) and torch.equal(ranks[0][0], ranks[2][0])
    true = sum(
        gradient(rank, step, size, torch.float64)
        for rank in range(world_size)
        for step in range(2 * steps)
    )
    kept = sum(residual for _, residual in ranks)
    assert torch.allclose(ranks[0][0] + kept, torch.as_tensor(true), rtol=0, atol=1e-10)
    assert torch.as_tensor(kept).abs().max() > 1e-3


def test_int8_sends_a_quarter_of_the_ring() -> None:
    size = 1_000_000

    def rank_main(mesh: Mesh) -> tuple[int, int]:
        collectives = new_group(mesh)
        sums = QuantizedAllReduce(collectives, Quantization("int8").quantizer())
        before = mesh.bytes_sent
        collectives.all_reduce(gradient(mesh.rank, 0, size))
        between = mesh.bytes_sent
        sums.all_reduce(gradient(mesh.rank, 0, size)).wait()
        return between - before, mesh.bytes_sent - between

    for plain, quantized in run_ranks(3, rank_main, kind="tcp"):
        assert plain >= 4 * size * 4 // 3
        assert 0.25 * plain < quantized <= 0.255 * plain


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_reaches_all_ranks(kind: str, bad: float) -> None:
    def rank_main(mesh: Mesh) -> Tensor:
        flat = gradient(mesh.rank, 0, 1000)
        if mesh.rank == 1:
            flat[900] = bad
        sums = QuantizedAllReduce(new_group(mesh), Quantization(kind).quantizer())
        sums.all_reduce(flat).wait()
        return flat

    for flat in run_ranks(3, rank_main):
        assert not torch.isfinite(flat[900])
        assert torch.isfinite(flat[:600]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    def rank_main(mesh: Mesh) -> Tensor:
        flat = gradient(mesh.rank, 0, 1000, dtype)
        sums = QuantizedAllReduce(new_group(mesh), Quantization("none").quantizer())
        sums.all_reduce(flat).wait()
        return flat

    expected = sum(gradient(rank, 0, 1000, dtype).float() for rank in range(4))
    for flat in run_ranks(4, rank_main):
        assert torch.equal(flat, torch.as_tensor(expected).to(dtype))


@WORLDS
@pytest.mark.parametrize("size", [0, 1, 3])
def test_hardly_anything(size: int, world_size: int) -> None:
    def rank_main(mesh: Mesh) -> Tensor:
        flat = torch.ones(size)
        sums = QuantizedAllReduce(new_group(mesh), Quantization("int8").quantizer())
        sums.all_reduce(flat, ErrorFeedback(size)).wait()
        return flat

    for flat in run_ranks(world_size, rank_main):
        assert torch.allclose(flat, torch.full((size,), float(world_size)))
