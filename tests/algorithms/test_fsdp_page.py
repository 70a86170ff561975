"""The short version on docs/algorithms/fsdp.md is what the algorithm computes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.collectives.api import Collectives
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks
from smolrun.training.optimizer import make_optimizer
from tests.algorithms import worlds

PAGE = Path(__file__).parents[2] / "docs" / "algorithms" / "fsdp.md"


def naive() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert 20 <= len([line for line in code.splitlines() if line]) <= 40
    names: dict[str, Any] = {}
    exec(code, names)
    return names["naive_fsdp"]


def plainly(*args: Any) -> Any:
    """SGD with one learning rate and nothing else."""
    return dataclasses.replace(
        right_context(*args),
        grad_clip=0.0,
        learning_rate=lambda update: 0.05,
        make_optimizer=functools.partial(make_optimizer, name="sgd", lr=0.05),
    )


right_context = worlds.context


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("model", ["language_model", "mlp"])
def test_the_page_is_right(model: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "context", plainly)
    real = worlds.train("fsdp", model, world_size, overrides={"bucket_mb": 0.0005})[0].parameters
    single = worlds.train("single", model, 1)[0].parameters
    torch.manual_seed(0)
    start = worlds.MODELS[model]().double()
    train = naive()

    def rank_main(mesh: Mesh) -> dict[str, torch.Tensor]:
        plan = worlds.plan_batches(worlds.GLOBAL_BATCH, [1.0] * world_size, mesh.rank)
        batches = []
        for step in range(10):
            (batch,) = worlds.share(worlds.sample(model, step), plan, step)
            inputs = batch.inputs.double() if model == "mlp" else batch.inputs
            batches.append((inputs, batch.targets))
        whole: dict[str, torch.Tensor] = train(
            copy.deepcopy(start), Collectives(mesh), batches, 0.05
        )
        return whole

    for found in run_ranks(world_size, rank_main):
        for name, value in single.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-12)
            assert torch.allclose(real[name], value, rtol=0, atol=1e-12)
