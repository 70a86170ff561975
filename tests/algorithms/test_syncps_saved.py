"""Checkpoints of syncps: the server writes them, and any other algorithm or world size goes on from
them; and not so where something is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.syncps import SyncPSServer
from smolrun.parts.quantization import Quantization
from tests.algorithms.test_fsdp_saved import worst
from tests.algorithms.test_saved import STEPS, contents, run_part, same

SMALL = {"bucket_mb": 0.0005}
IDLE = {**SMALL, "server_trains": False}
AVERAGE = {**SMALL, "ema_decay": 0.7, "pull_weights": "average"}
INT8 = {"quantization": Quantization("int8", block=32)}


@pytest.mark.parametrize("staleness", [0, 2])
def test_any_algorithm_and_world_size_goes_on_from_any_other(
    tmp_path: Path, staleness: int
) -> None:
    whole, _ = run_part(tmp_path / "a", "classicdp", 2, until=STEPS, staleness=staleness)
    checkpoint: Path | None = None
    turns: list[tuple[int, str, int, dict[str, Any]]] = [
        (2, "syncps", 3, IDLE),
        (3, "classicdp", 2, SMALL),
        (5, "syncps", 4, SMALL),
        (6, "fsdp", 2, {**SMALL, "stage": 2}),
        (7, "syncps", 2, IDLE),
        (8, "syncps", 1, SMALL),
        (STEPS, "syncps", 3, SMALL),
    ]
    for until, algorithm, size, overrides in turns:
        checkpoint, _ = run_part(
            tmp_path / "b",
            algorithm,
            size,
            until=until,
            resume=checkpoint,
            staleness=staleness,
            overrides=overrides,
        )
    assert checkpoint is not None
    assert worst(whole, checkpoint) < 1e-12


KEYS: dict[str, dict[str, Any]] = {
    "idle server": {"overrides": IDLE, "staleness": 1},
    "average": {"overrides": AVERAGE},
    "average, late": {"overrides": AVERAGE, "staleness": 2},
    "int8": {"overrides": SMALL, "precision": "float32", "more": INT8},
    "int8, late": {"overrides": SMALL, "precision": "float32", "more": INT8, "staleness": 2},
    "fp16": {"overrides": SMALL, "precision": "fp16"},
    "bf16_params": {"overrides": SMALL, "precision": "bf16_params"},
}


@pytest.mark.parametrize("name", KEYS)
def test_it_goes_on_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    whole, hashes = run_part(tmp_path / "a", "syncps", 3, until=STEPS, **KEYS[name])
    first, _ = run_part(tmp_path / "b", "syncps", 3, until=4, **KEYS[name])
    second, again = run_part(tmp_path / "b", "syncps", 3, until=STEPS, resume=first, **KEYS[name])
    assert len(set(hashes)) == 1 and again == hashes
    assert same(whole, second)


def forget_the_average(algorithm: Algorithm) -> None:
    if isinstance(algorithm, SyncPSServer):
        algorithm.average.restart()


def test_an_average_that_is_left_out_is_seen(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"overrides": AVERAGE}
    whole, _ = run_part(tmp_path / "a", "syncps", 2, until=STEPS, **keys)
    first, _ = run_part(tmp_path / "b", "syncps", 2, until=4, **keys)
    second, _ = run_part(
        tmp_path / "b", "syncps", 2, until=STEPS, resume=first, hurt=forget_the_average, **keys
    )
    assert not same(whole, second)


def test_others_go_on_from_the_newest_weights_of_a_run_with_an_average(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"overrides": {**SMALL, "ema_decay": 0.7}}
    whole, _ = run_part(tmp_path / "a", "single", 1, until=STEPS)
    first, _ = run_part(tmp_path / "b", "syncps", 3, until=4, **keys)
    assert any(key.startswith("average/") for key in contents(first))
    second, _ = run_part(tmp_path / "b", "single", 1, until=STEPS, resume=first)
    assert worst(whole, second) < 1e-12


def test_what_rounding_took_from_other_ranks_is_not_lost_on_the_server(tmp_path: Path) -> None:
    """It does not round its own gradient, so it adds its part to that at once."""
    keys: dict[str, Any] = {"overrides": SMALL, "precision": "float32", "more": INT8}
    first, _ = run_part(tmp_path, "classicdp", 2, until=4, **keys)
    second, _ = run_part(tmp_path, "syncps", 3, until=5, resume=first, **keys)
    before = contents(first)["residual/mix.weight"]
    after = contents(second)["residual/mix.weight"]
    assert before.any() and after.shape[1] == 3
    assert torch.equal(after[:, 0], torch.zeros_like(after[:, 0])) and after[:, 1:].any()
