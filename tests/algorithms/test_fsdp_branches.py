"""Ranks that run different layers: replicas may (stages 0 to 2), stage 3 says so by name, whatever
the layers' shapes, order and number, and whoever sees it first."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from smolrun.errors import CollectiveMismatch, MeshClosed, PeerLost, SmolrunError
from tests.algorithms import worlds
from tests.algorithms.test_fsdp import keys
from tests.algorithms.worlds import train

WIDTHS = pytest.mark.parametrize("width", [24, 200])  # shards that are sent at once, and granted


def rank() -> int:
    """Ranks are threads here, each with a name that says which."""
    return int(threading.current_thread().name.removeprefix("rank-"))


class Branches(nn.Module):
    """From the second pass on, ranks use layers as `choose(model, x, rank)` says."""

    def __init__(self, width: int, choose: Callable[[Branches, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(9, width)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.bottle = nn.Sequential(nn.Linear(width, 7), nn.Linear(7, width))
        self.last = nn.Linear(width, 5)
        self.choose = choose
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        x = torch.tanh(self.first(x))
        return self.last(self.choose(self, x) if self.passes > 1 else self.right(self.left(x)))


def other(model: Branches, x: Tensor) -> Tensor:
    return model.left(x) if rank() == 0 else model.right(x)


def other_shape(model: Branches, x: Tensor) -> Tensor:
    return model.left(x) if rank() == 0 else model.bottle(x)


def other_order(model: Branches, x: Tensor) -> Tensor:
    return model.left(model.right(x)) if rank() == 0 else model.right(model.left(x))


def one_more(model: Branches, x: Tensor) -> Tensor:
    return model.left(model.right(x)) if rank() == 1 else model.right(x)


def one_more_at_the_end(model: Branches, x: Tensor) -> Tensor:
    """Layer drop: the extra layer is used last in forward, and first in backward."""
    x = model.right(model.left(x))
    return model.left(x) if rank() == 1 else x


def twice(model: Branches, x: Tensor) -> Tensor:
    x = model.right(model.left(x))
    return model.right(model.left(x)) if rank() == 0 else x


def no_backward(model: Branches, x: Tensor) -> Tensor:
    """Forward is the same, but one rank's backward ends early."""
    x = model.left(x)
    return model.right(x.detach() if rank() == 0 else x)


def run_apart(
    monkeypatch: pytest.MonkeyPatch, choose: Callable[[Branches, Tensor], Tensor], width: int
) -> Callable[..., dict[int, SmolrunError]]:
    """A function that trains, and returns the error of every rank."""
    monkeypatch.setitem(worlds.MODELS, "mlp", lambda: Branches(width, choose))
    errors: dict[int, SmolrunError] = {}
    whole = worlds.run

    def run(*args: object) -> worlds.Trace:
        try:
            return whole(*args)  # type: ignore[arg-type]
        except SmolrunError as error:
            errors[rank()] = error
            return worlds.Trace()

    monkeypatch.setattr(worlds, "run", run)

    def apart(world_size: int, prefetch: int, kind: str = "memory") -> dict[int, SmolrunError]:
        errors.clear()
        overrides = keys(3, prefetch=prefetch)
        train("fsdp", "mlp", world_size, steps=3, overrides=overrides, kind=kind)
        return errors

    return apart


@WIDTHS
@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize(
    "choose",
    [other, other_shape, other_order, one_more, one_more_at_the_end, twice, no_backward],
)
def test_stage_3_names_what_differs(
    choose: Callable[[Branches, Tensor], Tensor],
    prefetch: int,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart = run_apart(monkeypatch, choose, width)
    worlds_of_ranks = [(2, "memory"), (3, "memory"), (2, "tcp")]
    for world_size, kind in worlds_of_ranks[: 3 if prefetch == 1 else 2]:
        errors = apart(world_size, prefetch, kind)
        assert len(errors) == world_size
        found = [e for e in errors.values() if isinstance(e, CollectiveMismatch)]
        assert found, errors
        for error in found:
            assert len(set(error.ranks)) == len(set(error.operations)) == 2
            assert any("all_gather of layer" in operation for operation in error.operations)
            assert "algorithm=classicdp or algorithm.stage=2" in error.hint
        others = [e for e in errors.values() if not isinstance(e, CollectiveMismatch)]
        assert all(isinstance(error, PeerLost | MeshClosed) for error in others), errors


def test_both_layers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = run_apart(monkeypatch, other, 24)(2, 0)
    error = errors[0]
    assert isinstance(error, CollectiveMismatch)
    assert error.ranks == (0, 1)
    assert error.operations[0].startswith("all_gather of layer left")
    assert error.operations[1].startswith("all_gather of layer right")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_replicas_may_run_different_layers(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_sample(model: Branches, x: Tensor) -> Tensor:
        return model.left(x) if x.sum() > 0 else model.right(x)

    def build() -> Branches:
        model = Branches(24, by_sample)
        model.passes = 1
        return model

    monkeypatch.setitem(worlds.MODELS, "mlp", build)
    reference = train("single", "mlp", 1, micro_batch_size=1)[0]
    for trace in train("fsdp", "mlp", 3, micro_batch_size=1, overrides=keys(stage)):
        assert trace.losses == pytest.approx(reference.losses, abs=1e-12)
