"""Residuals in checkpoints: exact on as many ranks, summed on others, and missed where they are
left out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.bucketed import BucketedAlgorithm
from smolrun.parts.quantization import Quantization
from tests.algorithms.test_saved import STEPS, contents, run_part, same

INT8 = {"more": {"quantization": Quantization("int8", block=32)}}
CASES = [
    ("classicdp", None, 0), ("classicdp", None, 2), ("fsdp", 0, 1), ("fsdp", 1, 2), ("fsdp", 2, 0),
    ("fsdp", 2, 2), ("fsdp", 3, 0),
]  # fmt: skip


def keys(stage: int | None) -> dict[str, Any]:
    small = {"bucket_mb": 0.0005}
    return {"overrides": small if stage is None else {**small, "stage": stage}, **INT8}


def residuals(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Summed over ranks and steps in flight: what training still has to get."""
    found = contents(checkpoint)
    return {
        key: tensor.sum(dim=(0, 1)) for key, tensor in found.items() if key.startswith("residual/")
    }


@pytest.mark.parametrize(("algorithm", "stage", "staleness"), CASES)
def test_the_same_ranks_go_on_to_the_byte(
    tmp_path: Path, algorithm: str, stage: int | None, staleness: int
) -> None:
    more = {**keys(stage), "staleness": staleness, "precision": "float32"}
    whole, hashes = run_part(tmp_path / "a", algorithm, 3, until=STEPS, **more)
    at = random.randrange(2, STEPS)
    first, _ = run_part(tmp_path / "b", algorithm, 3, until=at, **more)
    second, again = run_part(tmp_path / "b", algorithm, 3, until=STEPS, resume=first, **more)
    assert again == hashes or stage == 3
    assert same(whole, second), f"stopped after {at}"
    saved = contents(whole)["residual/mix.weight"]
    assert saved.shape == (staleness + 1, 3, 12, 12) and saved.any()


def forget_residuals(algorithm: Algorithm) -> None:
    assert isinstance(algorithm, BucketedAlgorithm)
    for feedback in algorithm.reducer._feedback.values():
        feedback.residual.zero_()


@pytest.mark.parametrize(("algorithm", "stage"), [("classicdp", None), ("fsdp", 2)])
def test_residuals_that_are_left_out_are_seen(
    tmp_path: Path, algorithm: str, stage: int | None
) -> None:
    """The negative control of the test above."""
    more = {**keys(stage), "precision": "float32"}
    whole, _ = run_part(tmp_path / "a", algorithm, 3, until=STEPS, **more)
    first, _ = run_part(tmp_path / "b", algorithm, 3, until=4, **more)
    second, _ = run_part(
        tmp_path / "b", algorithm, 3, until=STEPS, resume=first, hurt=forget_residuals, **more
    )
    assert not same(whole, second)


def test_other_ranks_stages_and_algorithms_get_the_sum(tmp_path: Path) -> None:
    """Saved again as it was loaded, not one step later: nothing is lost, nothing counts twice."""
    checkpoint, _ = run_part(tmp_path / "a", "fsdp", 3, until=3, **keys(2))
    expected = residuals(checkpoint)
    assert any(tensor.any() for tensor in expected.values())
    turns = [("classicdp", None, 2), ("fsdp", 3, 4), ("fsdp", 1, 1), ("fsdp", 0, 5)]
    for algorithm, stage, size in turns:
        folder = tmp_path / f"{size}"
        checkpoint, _ = run_part(folder, algorithm, size, until=3, resume=checkpoint, **keys(stage))
        found = residuals(checkpoint)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=0, atol=1e-12)
            shares = contents(checkpoint)[key][0].flatten(1)
            assert ((shares != 0).sum(0) <= 1).all(), "every number has one owner"


def test_late_steps_are_summed_too(tmp_path: Path) -> None:
    first, _ = run_part(tmp_path / "a", "classicdp", 2, until=5, staleness=2, **keys(None))
    second, _ = run_part(
        tmp_path / "b", "classicdp", 3, until=5, staleness=2, resume=first, **keys(None)
    )
    for key, tensor in residuals(first).items():
        assert torch.allclose(residuals(second)[key], tensor, rtol=0, atol=1e-12)


def test_without_feedback_nothing_is_saved_and_what_was_is_let_go(tmp_path: Path) -> None:
    first, _ = run_part(tmp_path / "a", "classicdp", 2, until=3, **keys(None))
    plain = {"more": {"quantization": Quantization("int8", error_feedback=False)}}
    second, _ = run_part(tmp_path / "b", "classicdp", 2, until=5, resume=first, **plain)
    assert residuals(first) and not residuals(second)
    third, _ = run_part(tmp_path / "c", "classicdp", 2, until=7, resume=second, **keys(None))
    assert residuals(third)
