"""precision=bf16_params: replicas stay equal bit by bit, and training goes where float32 goes."""

from __future__ import annotations

import pytest
import torch

from smolrun.collectives.api import new_group
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks
from tests.algorithms.worlds import train


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "adafactor"])
@pytest.mark.parametrize(("world_size", "staleness"), [(2, 0), (3, 2)])
def test_replicas_are_equal_after_every_update(
    world_size: int, staleness: int, optimizer: str
) -> None:
    traces = train(
        "classicdp",
        "language_model",
        world_size,
        optimizer=optimizer,
        precision="bf16_params",
        staleness=staleness,
    )
    assert len(traces[0].hashes) == 10
    # Every update changed something; those that were drained are looked at together.
    assert len(set(traces[0].hashes)) == 10 - max(0, staleness - 1)
    assert all(trace.hashes == traces[0].hashes for trace in traces)


def test_it_learns_like_float32() -> None:
    half, full = (
        train("classicdp", "language_model", 2, steps=60, precision=precision)[0].losses
        for precision in ("bf16_params", "float32")
    )
    assert full[-1] < full[0] - 0.05
    assert half[-1] == pytest.approx(full[-1], abs=0.2 * (full[0] - full[-1]))


def test_parameters_stay_in_half_precision_and_losses_do_not() -> None:
    (trace,) = train("single", "mlp", 1, precision="bf16_params")
    assert {value.dtype for value in trace.parameters.values()} == {torch.bfloat16}
    assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in trace.losses)


def test_sums_on_the_way_are_rounded_to_the_nearest() -> None:
    values = [
        torch.randn(10_001, generator=torch.Generator().manual_seed(rank)).bfloat16()
        for rank in range(2)
    ]

    def add(mesh: Mesh) -> torch.Tensor:
        tensor = values[mesh.rank].clone()
        new_group(mesh).all_reduce(tensor)
        return tensor

    expected = (values[0].float() + values[1].float()).bfloat16()
    assert all(torch.equal(result, expected) for result in run_ranks(2, add))
