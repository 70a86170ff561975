"""Frozen parameters at every stage: linear probes, frozen middles and tails, adapters, and heads so
small that ranks own nothing of them. All equal to `single`, also after a resume on other ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smolrun.algorithms.fsdp import ParameterShards
from smolrun.parts.norms import LayerNorms
from tests.algorithms import worlds
from tests.algorithms.test_fsdp import assert_equal, keys
from tests.algorithms.test_fsdp_saved import worst
from tests.algorithms.test_saved import STEPS, run_part
from tests.algorithms.worlds import train

STAGES = [0, 1, 2, 3]


class Adapter(nn.Module):
    """A frozen matrix beside two small ones that are trained (LoRA), in one module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(width, width) / 4, requires_grad=False)
        self.down = nn.Parameter(torch.randn(2, width) / 4)
        self.up = nn.Parameter(torch.zeros(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.frozen.T + x @ self.down.T @ self.up.T)


class Scale(nn.Module):
    """One number that is trained: of three ranks, two own nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def stack(**middle: nn.Module) -> nn.Module:
    """Tokens to logits; what is not among `middle` is one linear layer each."""
    parts = {name: nn.Linear(12, 12) for name in ("first", "second", "third")} | middle
    model = nn.Sequential()
    model.add_module("embedding", nn.Embedding(17, 12))
    for name, module in parts.items():
        model.add_module(name, module)
        model.add_module(f"{name}_tanh", nn.Tanh())
    model.add_module("head", nn.Linear(12, 17))
    return model


def frozen(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "probe": lambda: frozen(stack(), "embedding", "first", "second", "third"),
    "middle": lambda: frozen(stack(), "second"),
    "tail": lambda: frozen(stack(), "second", "third", "head"),
    "biases": lambda: frozen(
        stack(), "embedding", *(f"{n}.weight" for n in ("first", "second", "third", "head"))
    ),
    "adapters": lambda: frozen(
        stack(first=Adapter(12), third=Adapter(12)), "embedding", "second", "head"
    ),
    "one_number": lambda: frozen(
        stack(scale=Scale()), "embedding", "first", "second", "third", "head"
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_equals_single(stage: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worlds.MODELS, "frozen", MODELS[name])
    more = {"norms": LayerNorms("all", 2)}
    reference = train("single", "frozen", 1, steps=5, optimizer="adamw", more=more)[0]
    for prefetch in (0, 1) if stage == 3 else (1,):
        traces = train(
            "fsdp",
            "frozen",
            3,
            steps=5,
            optimizer="adamw",
            overrides=keys(stage, prefetch=prefetch),
            more=more,
        )
        assert_equal(traces, reference, most=1e-9)
        for one, other in zip(traces[0].results, reference.results, strict=True):
            for what, layers in (other.norms or {}).items():
                assert (one.norms or {})[what] == pytest.approx(layers, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "bf16_params"])
@pytest.mark.parametrize("name", ["adapters", "one_number"])
def test_half_precision(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worlds.MODELS, "frozen", MODELS[name])
    reference = train("single", "frozen", 1, precision=precision, steps=5)[0]
    for trace in train("fsdp", "frozen", 3, precision=precision, steps=5, overrides=keys(3)):
        assert trace.losses == pytest.approx(reference.losses, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_any_stage_and_world_size_goes_on_from_any_other(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    whole, _ = run_part(tmp_path / "a", "single", 1, until=STEPS, model=model)
    checkpoint: Path | None = None
    for until, stage, world_size in ((2, 3, 3), (4, 2, 2), (6, 1, 4), (7, 0, 2), (STEPS, 3, 2)):
        checkpoint, _ = run_part(
            tmp_path / "b",
            "fsdp",
            world_size,
            until=until,
            resume=checkpoint,
            model=model,
            overrides={"stage": stage, "bucket_mb": 0.0005},
        )
    assert checkpoint is not None
    assert worst(whole, checkpoint) < 1e-12


def test_frozen_parameters_are_cut_and_have_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank holds its share of both kinds; what travels in backward are trained ones only."""
    monkeypatch.setitem(worlds.MODELS, "frozen", MODELS["probe"])
    held: list[tuple[int, int, int]] = []
    whole = worlds.run

    def run(runner: ParameterShards, *more: object) -> worlds.Trace:
        trace = whole(runner, *more)  # type: ignore[arg-type]
        trained = sum(p.numel() for _, p in runner.optimized_params)
        both = sum(bucket.shard.numel() for bucket in runner.shards)
        held.append((both, trained, sum(total.numel() for total in runner.gradients.sums[0])))
        return trace

    monkeypatch.setattr(worlds, "run", run)
    train("fsdp", "frozen", 3, steps=1, overrides=keys(3))
    every, head = 17 * 12 + 3 * (12 * 12 + 12) + 12 * 17 + 17, 12 * 17 + 17
    for both, trained, summed in held:
        assert both == pytest.approx(every / 3, abs=5)
        assert trained == summed == pytest.approx(head / 3, abs=2)
