"""Buffers that forward changes: after every update all ranks have those of the first rank that has
trained; where ranks cannot share them the model is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from smolrun.algorithms import base
from smolrun.algorithms.edp.base import EDP
from smolrun.algorithms.edp.work_queue import WorkItem
from smolrun.errors import ConfigError
from smolrun.mesh.mesh import Mesh, Work
from smolrun.parts.placement import plan_batches
from smolrun.parts.replicas import contents
from smolrun.parts.step_clock import StepClock
from smolrun.testing import run_ranks
from tests.algorithms import parameter_server as ps
from tests.algorithms import worlds
from tests.algorithms.test_saved import run_part, same


class Running(worlds.TinyLanguageModel):
    """Batch norm, and a mean that forward itself reads and puts into a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(17)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * tokens.double().mean().to(self.mean.dtype)
        logits = super().forward(tokens) * (1 + self.mean)
        return self.batch_norm(logits.transpose(1, 2)).transpose(1, 2)


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worlds.MODELS, "running", Running)


KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("classicdp", {}, 0),
    ("classicdp", {}, 2),
    ("classicdp", {"shard_optimizer": True}, 0),
    ("fsdp", {"stage": 2}, 1),
    ("fsdp", {"stage": 3}, 0),
    ("syncps", {"server_trains": True}, 0),
    ("syncps", {"server_trains": False}, 1),
]


@pytest.mark.parametrize(("algorithm", "overrides", "staleness"), KINDS)
def test_all_have_the_buffers_of_the_first_rank_that_trains(
    algorithm: str, overrides: dict[str, Any], staleness: int
) -> None:
    traces = worlds.train(
        algorithm, "running", 3, steps=5, staleness=staleness, overrides=overrides
    )
    assert len({tuple(trace.hashes) for trace in traces}) == 1, "also after every single update"
    first = int(overrides.get("server_trains") is False)
    weights = [0.0, 1.0, 1.0] if first else [1.0] * 3
    plan = plan_batches(worlds.GLOBAL_BATCH, weights, first, 3)
    mean = torch.zeros((), dtype=torch.float64)
    for step in range(5):
        for batch in worlds.share(worlds.sample("running", step), plan, step):
            mean = 0.9 * mean + 0.1 * batch.inputs.double().mean()
    assert torch.equal(traces[0].parameters["mean"], mean)

    # What is evaluated is what is saved.
    net = Running().double()
    net.load_state_dict(traces[0].parameters)
    batch = worlds.sample("running", 999)
    loss = cross_entropy(
        net.eval()(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    assert traces[0].eval is not None
    assert traces[0].eval.loss == pytest.approx(loss.item(), abs=1e-10)


# run_part gives every rank samples.
TRAINING = [kind for kind in KINDS if kind[1].get("server_trains", True)]


@pytest.mark.parametrize(("algorithm", "overrides", "staleness"), TRAINING)
def test_a_resumed_run_is_exact(
    tmp_path: Path, algorithm: str, overrides: dict[str, Any], staleness: int
) -> None:
    keys: dict[str, Any] = {"overrides": overrides, "staleness": staleness, "model": Running}
    whole, hashes = run_part(tmp_path / "a", algorithm, 3, until=5, **keys)
    first, _ = run_part(tmp_path / "b", algorithm, 3, until=2, **keys)
    second, again = run_part(tmp_path / "b", algorithm, 3, until=5, resume=first, **keys)
    assert again == hashes
    assert same(whole, second)


def test_alone_nothing_has_to_be_shared() -> None:
    reference = worlds.train("single", "running", 1, steps=3)[0]
    (trace,) = worlds.train("classicdp", "running", 1, steps=3)
    assert torch.equal(trace.parameters["mean"], reference.parameters["mean"])


def test_samples_that_do_not_count_change_no_buffer() -> None:
    """Rank 0, whose buffers are taken, has one sample, and then two micro-batches without any."""
    keys: dict[str, Any] = {"steps": 3, "micro_batch_size": 2, "speeds": [1.0, 5.0, 5.0]}
    expected = worlds.train("fsdp", "running", 3, overrides={"stage": 2}, **keys)[0]
    found = worlds.train("fsdp", "running", 3, overrides={"stage": 3}, **keys)[0]
    assert found.parameters["batch_norm.num_batches_tracked"] == 3
    for name, value in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, msg=name)
    assert found.eval is not None and expected.eval is not None
    assert found.eval.loss == pytest.approx(expected.eval.loss)


class Seldom(worlds.TinyLanguageModel):
    """Changes its buffer for some samples only, so not on every rank and not in every step."""

    first_tokens: ClassVar = {10}

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training and int(tokens[0, 0]) in self.first_tokens:
            self.seen += tokens.double().mean()
        return super().forward(tokens) * (1 + 0.01 * self.seen)


@pytest.mark.parametrize(("staleness", "first_tokens"), [(0, {10}), (2, {10}), (2, {0, 1, 2})])
def test_a_resumed_run_is_exact_where_a_buffer_changes_seldom(
    tmp_path: Path, staleness: int, first_tokens: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has no samples, so what is in flight in a checkpoint says whose buffers are taken."""
    monkeypatch.setattr(Seldom, "first_tokens", first_tokens)
    keys: dict[str, Any] = {"staleness": staleness, "model": Seldom, "speeds": [0.0, 1.0, 1.0]}
    whole, hashes = run_part(tmp_path / "a", "classicdp", 3, until=9, **keys)
    assert len(set(hashes)) == 1
    part: Path | None = None
    for until in (4, 6, 9):  # in steps 6 and 7 no sample begins with 10
        part, again = run_part(tmp_path / "b", "classicdp", 3, until=until, resume=part, **keys)
    assert again == hashes
    assert part is not None and same(whole, part)


def test_a_buffer_that_changes_late_is_seen_without_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Late(worlds.TinyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3,), math.nan))
            self.register_buffer("total", torch.zeros(()))
            self.forwards = 0

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            self.forwards += self.training
            if self.forwards > 12:
                self.total += tokens.double().mean()
            return super().forward(tokens)

    copied: list[bool] = []

    def recorded(tensors: Any, *, by_bytes: bool) -> Any:
        copied.append(by_bytes)
        return contents(tensors, by_bytes=by_bytes)

    monkeypatch.setattr(base, "contents", recorded)
    monkeypatch.setitem(worlds.MODELS, "late", Late)
    traces = worlds.train("classicdp", "late", 2, steps=8)
    assert traces[0].hashes == traces[1].hashes
    assert traces[0].parameters["total"] > 0
    assert sum(copied) < len(copied), "large buffers are not copied for ever"


def test_waiting_for_buffers_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    wait = StepClock.wait

    def recorded(self: StepClock, work: Work) -> None:
        counted.append(work.label)
        wait(self, work)

    monkeypatch.setattr(StepClock, "wait", recorded)
    worlds.train("classicdp", "running", 2, steps=2)
    assert len([label for label in counted if "broadcast" in label]) == 2 * 2


def test_a_buffer_that_forward_makes_or_removes_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lazy(worlds.TinyLanguageModel):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "first"):
                self.register_buffer("first", tokens[0].clone())
            return super().forward(tokens)

    class Once(worlds.TinyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("first", torch.zeros(()))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if hasattr(self, "first"):
                del self.first
            return super().forward(tokens)

    for model in (Lazy, Once):
        monkeypatch.setitem(worlds.MODELS, "other", model)
        with pytest.raises(ConfigError, match=r"'first'.* in the constructor"):
            worlds.train("single", "other", 1, steps=2)
    # A rank without samples waits for none that it has not. TCP: it sees at once that rank 0 ended.
    with pytest.raises(ConfigError, match="'first'"):
        worlds.train("classicdp", "other", 2, steps=2, speeds=[1.0, 0.0], kind="tcp")


def test_edp_refuses_them_by_name() -> None:
    net = Running().double()

    batch = worlds.sample("running", 0)

    def rank_main(mesh: Mesh) -> float:
        algorithm = ps.place(mesh, net)
        assert isinstance(algorithm, EDP)
        with pytest.raises(ConfigError, match=r"buffer 'mean'.*algorithm=classicdp"):
            if mesh.rank == 0:
                algorithm.try_out(batch)
            else:
                algorithm.compute_gradient(WorkItem(0, 0, 1), 0, [batch])
        return algorithm.model.state_dict()["mean"].item()

    server, worker = run_ranks(2, rank_main, elastic=True)
    assert server == 0, "trying out changes nothing"
    assert worker != 0


def test_syncps_refuses_them_where_it_leaves_ranks_behind() -> None:
    with pytest.raises(ConfigError, match=r"straggler_timeout_s=0"):
        worlds.train("syncps", "running", 2, steps=2, overrides={"straggler_timeout_s": 1.0})
