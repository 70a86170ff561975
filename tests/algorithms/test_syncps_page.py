"""The short version on docs/algorithms/syncps.md is what the algorithm computes, and its picture
what it sends."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.pictures import syncps_schedule
from smolrun.mesh.memory import MemoryWorld
from smolrun.mesh.mesh import Mesh
from smolrun.mesh.streams import Stream
from smolrun.testing import run_ranks
from smolrun.training.optimizer import make_optimizer
from smolrun.wire.frame import Tag
from tests.algorithms import worlds

PAGE = Path(__file__).parents[2] / "docs" / "algorithms" / "syncps.md"


def naive() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert 20 <= len([line for line in code.splitlines() if line]) <= 40
    names: dict[str, Any] = {}
    exec(code, names)
    return names["naive_syncps"]


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
    real = worlds.train("syncps", model, world_size, overrides={"bucket_mb": 0.0005})[0].parameters
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

        def tag(stream: int, step: int) -> Tag:
            return Tag(stream, step, 0)

        whole: dict[str, torch.Tensor] = train(copy.deepcopy(start), mesh, tag, batches, 0.05)
        return whole

    for found in run_ranks(world_size, rank_main):
        for name, value in single.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-12)
            assert torch.allclose(real[name], value, rtol=0, atol=1e-12)


def test_the_picture_is_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message of one step, by sender and receiver; two buckets, and numbers before them."""
    sent: list[tuple[int, int]] = []
    match_send = MemoryWorld.match_send

    def noted(world: MemoryWorld, key: Any, *rest: Any) -> None:
        if key[2].stream in (Stream.SERVER_PUSHES, Stream.SERVER_WEIGHTS):
            sent.append(key[:2])
        match_send(world, key, *rest)

    monkeypatch.setattr(MemoryWorld, "match_send", noted)
    worlds.train("syncps", "mlp", 3, steps=1, overrides={"bucket_mb": 0.001})
    drawn = [
        (rank, hop.to)
        for rank in range(3)
        for hop in syncps_schedule(rank, 3)
        if hop.to is not None
    ]
    assert Counter(sent).keys() == set(drawn)
    assert len(set(Counter(sent).values())) == 1, "as many messages up as down"
    taken = [
        (hop.source, rank)
        for rank in range(3)
        for hop in syncps_schedule(rank, 3)
        if hop.source is not None
    ]
    assert sorted(taken) == sorted(drawn), "whatever is sent is received"
