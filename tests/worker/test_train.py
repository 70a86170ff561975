"""What a rank builds from a configuration."""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import pytest
import torch

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.contract import FORWARD
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.cli.compose import compose
from smolrun.data.splits import Prepared
from smolrun.errors import CheckpointError, ConfigError
from smolrun.launch.control import Saving
from smolrun.testing import run_ranks
from smolrun.worker import train as worker_train
from smolrun.worker.train import place_algorithm, seed_everything

CPU = torch.device("cpu")


def place(*overrides: str) -> Algorithm:
    """The algorithm of a configuration for samples of 4 features and 3 classes, on one rank."""
    prepared = Prepared("features", "", "", 3, 4, None, None, 100, 10, "")
    config = compose(["algorithm=single", *overrides]).model_dump()
    (algorithm,) = run_ranks(1, lambda mesh: place_algorithm(config, prepared, mesh, CPU))
    return algorithm


@pytest.mark.parametrize(
    ("name", "what"),
    [("frozen", "none of its 2 parameters has requires_grad"), ("nothing", "returned a NoneType")],
)
def test_a_model_that_cannot_be_trained_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    (tmp_path / "untrainable.py").write_text(
        "from torch import nn\n"
        "def frozen(spec):\n    return nn.Linear(4, 3).requires_grad_(False)\n"
        "def nothing(spec):\n    nn.Linear(4, 3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=what):
        place(f"model.target=untrainable:{name}", "data=digits")


def test_draws_follow_the_seed_of_the_run(tmp_path: Path) -> None:
    reseed = place("model=mlp", "data=digits", "seed=7").context.reseed
    reseed(FORWARD, 24)
    drawn = torch.rand(3)
    seed_everything(CPU, 7, FORWARD, 24)
    assert torch.equal(torch.rand(3), drawn)


def draws() -> list[Any]:
    normal = numpy.random.standard_normal(3).tolist()
    return [random.random(), random.gauss(0, 1), *normal, *torch.randn(3).tolist()]


def test_equal_seeds_give_equal_draws_in_every_library() -> None:
    seed_everything(CPU, 1, 2, 3)
    first = draws()
    draws()
    seed_everything(CPU, 1, 2, 3)
    assert draws() == first


def test_other_seeds_give_other_draws_in_every_library() -> None:
    seen = []
    for words in ((0, 0, 1), (0, 1, 1), (0, 0, 2), (1, 0, 1), (2**63 - 1, 0, 10**12)):
        seed_everything(CPU, *words)
        seen.append(draws())
    assert all(len(set(numbers)) == len(seen) for numbers in zip(*seen, strict=True))


def test_a_state_that_does_not_fit_its_tensors_is_a_checkpoint_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a table of statistics with fewer columns than the state has names."""

    def restore(checkpoint: CheckpointReader, state: dict[str, Any]) -> None:
        raise IndexError("index 7 is out of bounds")

    reader = SimpleNamespace(manifest=SimpleNamespace(state={"algorithm": {}}), folder="c")
    monkeypatch.setattr(worker_train, "CheckpointReader", lambda folder: nullcontext(reader))
    checkpoints = object.__new__(worker_train.RankCheckpoints)
    checkpoints._saving = Saving("folder", "token", every=0, keep=1, keep_best=False, resume="c")
    checkpoints._algorithm = cast(Algorithm, SimpleNamespace(restore=restore))
    with pytest.raises(CheckpointError, match="cannot be used: IndexError"):
        checkpoints._restore()


def test_training_does_not_import_torch_compile() -> None:
    """It would take 1.5 s and 70 MB of each worker."""
    script = """
import sys, torch
from smolrun.models.initialise import build_model
from smolrun.training.optimizer import NAMES, make_optimizer
from tests.models.tiny import TINY, Spec, build
for name in NAMES:
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(lambda: build(Spec(), **TINY), 0, dtype=dtype, device="cpu")
        optimizer = make_optimizer(model.named_parameters(), name, lr=0.1)
        model(torch.ones(1, 4, dtype=torch.int64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
