"""The short versions on the pages of docs/algorithms are what the algorithms compute."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.collectives.api import new_group
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks
from smolrun.training.optimizer import make_optimizer
from tests.algorithms import worlds

PAGES = Path(__file__).parents[2] / "docs" / "algorithms"
State = dict[str, torch.Tensor]


def naive(algorithm: str) -> Callable[..., State]:
    text = (PAGES / f"{algorithm}.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 20 <= len([line for line in code.splitlines() if line]) <= 40
    names: dict[str, Any] = {}
    exec(code, names)
    train: Callable[..., State] = names[f"naive_{algorithm}"]
    return train


def plainly(*args: Any) -> Any:
    """SGD with one learning rate and nothing else."""
    return dataclasses.replace(
        right_context(*args),
        grad_clip=0.0,
        learning_rate=lambda update: 0.05,
        make_optimizer=functools.partial(make_optimizer, name="sgd", lr=0.05),
    )


right_context = worlds.context


def run_naive(algorithm: str, model: str, world_size: int, **keys: Any) -> list[State]:
    """What every rank holds after ten steps of the page's version."""
    torch.manual_seed(0)
    start = worlds.MODELS[model]().double()
    train = naive(algorithm)

    def rank_main(mesh: Mesh) -> State:
        plan = worlds.plan_batches(worlds.GLOBAL_BATCH, [1.0] * world_size, mesh.rank)
        batches = []
        for step in range(10):
            (batch,) = worlds.share(worlds.sample(model, step), plan, step)
            inputs = batch.inputs.double() if model == "mlp" else batch.inputs
            batches.append((inputs, batch.targets))
        return train(copy.deepcopy(start), new_group(mesh), batches, 0.05, **keys)

    return run_ranks(world_size, rank_main)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("model", ["language_model", "mlp"])
@pytest.mark.parametrize(
    ("algorithm", "overrides"), [("fsdp", {"bucket_mb": 0.0005}), ("classicdp", {})]
)
def test_the_page_is_right(
    algorithm: str,
    overrides: dict[str, Any],
    model: str,
    world_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worlds, "context", plainly)
    real = worlds.train(algorithm, model, world_size, overrides=overrides)[0].parameters
    single = worlds.train("single", model, 1)[0].parameters
    for found in run_naive(algorithm, model, world_size):
        for name, value in single.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-12)
            assert torch.allclose(real[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_page_of_pipelines_is_right(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "context", plainly)
    torch.manual_seed(0)
    start = worlds.decoder().double()
    real = worlds.train("mp_pipeline", "decoder", world_size)[0].parameters
    single = worlds.train("single", "decoder", 1)[0].parameters
    train = naive("mp_pipeline")
    samples = [worlds.sample("decoder", step) for step in range(10)]
    batches = [(batch.inputs, batch.targets) for batch in samples]
    found: State = {}
    for stage in run_ranks(
        world_size, lambda mesh: train(copy.deepcopy(start), mesh, batches, 0.05)
    ):
        found |= stage
    assert found.keys() == single.keys()
    for name, value in single.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-12)
        assert torch.allclose(real[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_page_of_experts_is_right(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "context", plainly)
    make = functools.partial(worlds.experts, balance_loss=0.0, z_loss=0.0)
    monkeypatch.setitem(worlds.MODELS, "language_model", make)
    single = worlds.train("single", "language_model", 1)[0].parameters
    found: State = {}
    for rank in run_naive("ep", "language_model", world_size):
        assert len(rank) < len(single) or world_size == 1
        found |= rank
    assert found.keys() == single.keys()
    for name, value in single.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-12)


def test_the_page_of_classicdp_is_right_about_late_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worlds, "context", plainly)
    single = worlds.train("single", "language_model", 1, staleness=2)[0].parameters
    for found in run_naive("classicdp", "language_model", 3, staleness=2):
        for name, value in single.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-12)
