"""Buffers that forward changes: after every update all ranks have those of the first rank that has
trained; where ranks cannot share them the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from smolrun.algorithms.edp_worker import EDP
from smolrun.errors import ConfigError
from smolrun.mesh.mesh import Mesh
from smolrun.parts.placement import plan_batches
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
    ("classicdp", {"owner_computes": True}, 0),
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


def test_a_buffer_that_the_first_forward_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(worlds.TinyLanguageModel):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "first"):
                self.register_buffer("first", tokens[0].clone())
            return super().forward(tokens)

    monkeypatch.setitem(worlds.MODELS, "lazy", Lazy)
    traces = worlds.train("classicdp", "lazy", 2, steps=2)
    assert traces[0].hashes == traces[1].hashes


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
                algorithm.gradient(0, 0, [batch])
        return algorithm.model.state_dict()["mean"].item()

    server, worker = run_ranks(2, rank_main, elastic=True)
    assert server == 0, "trying out changes nothing"
    assert worker != 0


def test_syncps_refuses_them_where_it_leaves_ranks_behind() -> None:
    with pytest.raises(ConfigError, match=r"straggler_s=0"):
        worlds.train("syncps", "running", 2, steps=2, overrides={"straggler_s": 1.0})
