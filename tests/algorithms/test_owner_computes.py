"""Replicas on machines of different kinds: equal to the last bit where owners compute, and drifting
apart, which is told and mended, where every rank updates its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.algorithms import classicdp
from smolrun.algorithms.classicdp import ClassicDP
from smolrun.algorithms.optimizer_shards import OptimizerShards
from smolrun.cli.compose import compose
from smolrun.errors import ConfigError
from smolrun.events import Drift, Event
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks
from smolrun.training.replica_sync import ReplicaSync
from tests.algorithms import worlds
from tests.algorithms.test_saved import STEPS, contents, run_part, same
from tests.algorithms.worlds import Trace, train

FOREIGN = 1  # the rank whose kernel rounds differently
OWNER, OWN = {"shard_optimizer": True}, {"shard_optimizer": False}
right_context = worlds.context


def foreign_kernel(mesh: Mesh, *args: Any) -> Any:
    """On one rank every update ends one unit in the last place higher."""
    context = right_context(mesh, *args)
    make: Callable[[Iterable[Any]], torch.optim.Optimizer] = context.make_optimizer

    def rounds_up(named: Iterable[Any]) -> torch.optim.Optimizer:
        optimizer = make(named)
        optimizer.register_step_post_hook(lambda *_: _one_ulp_more(optimizer))
        return optimizer

    if mesh.rank == FOREIGN:
        object.__setattr__(context, "make_optimizer", rounds_up)
    return context


@torch.no_grad()
def _one_ulp_more(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.copy_(parameter.nextafter(torch.full_like(parameter, math.inf)))


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "context", foreign_kernel)


def mixed(collectives: Any, own: str) -> list[str]:
    return ["Linux x86_64", *["Darwin arm64"] * (collectives.size - 1)]


def are_equal(traces: list[Trace]) -> bool:
    assert len(set(traces[0].hashes)) > 5, "the model does change"
    return all(trace.hashes == traces[0].hashes for trace in traces)


@pytest.mark.parametrize(("optimizer", "staleness"), [("adamw", 0), ("lion", 2), ("sgd", 0)])
@pytest.mark.usefixtures("foreign")
def test_a_foreign_kernel_makes_no_difference_to_replicas(optimizer: str, staleness: int) -> None:
    keys: dict[str, Any] = {"optimizer": optimizer, "staleness": staleness, "precision": "float32"}
    assert are_equal(train("classicdp", "language_model", 3, overrides=OWNER, **keys))
    # Negative control: that kernel is foreign indeed.
    assert not are_equal(train("classicdp", "language_model", 3, overrides=OWN, **keys))


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(("algorithm", "more"), [("classicdp", {}), ("fsdp", {"stage": 0})])
def test_auto_looks_at_the_classes_of_all_ranks(
    algorithm: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not are_equal(train(algorithm, "mlp", 3, overrides=more)), "one class: each its own"
    monkeypatch.setattr(classicdp, "gather_classes", mixed)
    assert are_equal(train(algorithm, "mlp", 3, overrides=more))


def test_who_computes_and_who_may_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(shard_optimizer: Any, is_elementwise: bool = True) -> list[tuple[type, bool]]:
        def rank_main(mesh: Mesh) -> tuple[type, bool]:
            context = right_context(mesh, "float32", "sgd", 0)
            object.__setattr__(context, "is_elementwise", is_elementwise)
            keys = {"bucket_mb": 1.0, "shard_optimizer": shard_optimizer}
            algorithm = classicdp.classicdp(context, **keys)
            return type(algorithm), algorithm.replicas_may_differ

        return run_ranks(2, rank_main)

    each, owner = (ClassicDP, False), (OptimizerShards, False)
    assert [made(value)[0] for value in ("auto", True, False)] == [each, owner, each]
    monkeypatch.setattr(classicdp, "gather_classes", mixed)
    drifts = (ClassicDP, True)
    assert [made(value)[0] for value in ("auto", True, False)] == [owner, owner, drifts]
    assert made("auto", is_elementwise=False) == [drifts] * 2  # adafactor


def test_owners_learn_what_single_learns() -> None:
    for model in worlds.MODELS:
        reference = train("single", model, 1)[0]
        for trace in train("classicdp", model, 3, overrides=OWNER):
            assert trace.losses == pytest.approx(reference.losses, abs=1e-12)
            for name, value in reference.parameters.items():
                assert torch.allclose(trace.parameters[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("staleness", [0, 2])
def test_it_goes_on_to_the_same_bytes_and_in_other_forms(tmp_path: Path, staleness: int) -> None:
    keys: dict[str, Any] = {"staleness": staleness}
    whole, _ = run_part(tmp_path / "a", "classicdp", 3, until=STEPS, overrides=OWNER, **keys)
    first, _ = run_part(tmp_path / "b", "classicdp", 3, until=4, overrides=OWNER, **keys)
    for other, size, more in (
        ("classicdp", 3, OWNER),
        ("classicdp", 2, OWN),
        ("fsdp", 2, {"stage": 2, "bucket_mb": 0.0005}),
        ("single", 1, None),
    ):
        folder = tmp_path / f"{other}{size}"
        second, _ = run_part(folder, other, size, until=STEPS, resume=first, overrides=more, **keys)
        assert same(whole, second) or more is not OWNER
        expected, found = contents(whole), contents(second)
        assert all(
            torch.allclose(expected[key], found[key], rtol=0, atol=1e-12)
            for key in expected
            if "facts" not in key
        )


# -- drift --


def drifting(monkeypatch: pytest.MonkeyPatch, every: Any) -> list[list[Event]]:
    """What is told by each rank of ten updates with a foreign kernel on one of three."""
    events: list[list[Event]] = [[], [], []]

    right = worlds.run

    def run(runner: Any, *args: Any) -> Trace:
        sync = ReplicaSync(runner, every, events[runner.context.mesh.rank].append)
        step = runner.train_step

        def train_step(micro_batches: Any) -> Any:
            if (result := step(micro_batches)) is not None:
                sync.after_update(result)
            return result

        runner.train_step = train_step
        return right(runner, *args)

    monkeypatch.setattr(worlds, "run", run)
    traces = train("classicdp", "mlp", 3, overrides=OWN, precision="float32")
    differs = [len({trace.hashes[step] for trace in traces}) > 1 for step in range(10)]
    if every == 4:
        assert differs == [True, True, True, False, True, True, True, False, True, True]
    return events


@pytest.mark.usefixtures("foreign")
def test_replicas_that_drift_are_seen_and_become_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    for events in drifting(monkeypatch, 4):
        assert [type(event) for event in events] == [Drift, Drift]
        for event, step in zip(events, (3, 7), strict=True):
            assert isinstance(event, Drift)
            assert (event.step, event.ranks) == (step, [FOREIGN])
            assert event.difference is not None
            assert 1e-8 < event.difference < 1e-4


def test_replicas_that_do_not_drift_cost_a_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    for events in drifting(monkeypatch, 5):
        assert events == [Drift(4, 0.0, []), Drift(9, 0.0, [])]
    assert drifting(monkeypatch, "auto") == [[], [], []]
    monkeypatch.setattr(classicdp, "gather_classes", mixed)
    made = drifting(monkeypatch, "auto")
    assert made == [[], [], []], "auto looks every 100 updates, and there were ten"


def test_a_foreign_class_is_watched_unasked() -> None:
    class Told:
        replicas_may_differ = True

    assert ReplicaSync(Told(), "auto", print).every == 100  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["algorithm.shard_optimizer=true", "optimizer=adafactor"], "needs whole ones"),
        (["algorithm=fsdp", "training.resync_every=10"], "on one rank only"),
        (["algorithm=single", "cluster.ranks=1", "training.resync_every=10"], "one copy"),
        (["algorithm.shard_optimizer=maybe"], "algorithm.shard_optimizer"),
    ],
)
def test_what_cannot_be_is_refused(keys: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(keys)


@pytest.mark.parametrize(
    "keys",
    [
        ["optimizer=adafactor"],
        ["algorithm=fsdp", "algorithm.stage=2", "training.resync_every=10"],
        ["algorithm.shard_optimizer=true", "training.resync_every=1"],
    ],
)
def test_what_can_be_is_not(keys: list[str]) -> None:
    compose(keys)
