"""quantization=int8 as a user starts it: real processes, equal replicas, a quarter of the bytes,
and losses that end where they do without it."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.tasks.test_whole_runs import SMALL, rows, start, summary

KEYS = [*SMALL, "training.steps=6", "training.eval_batches=2", "training.sample_tokens=0"]


def run(folder: Path, *overrides: str) -> float:
    """The last evaluation's loss of a command in a folder of its own."""
    folder.mkdir()
    process = start(folder, *overrides)
    try:
        _, err = process.communicate(timeout=500)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    loss: float = summary(folder)["final_eval_loss"]
    return loss


@pytest.mark.soak
def test_replicas_are_equal_and_a_quarter_is_sent(tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    keys = [*KEYS, "model.width=128", "cluster.ranks=2", "checkpoint=none"]
    run(folder, *keys, "quantization=int8", "training.check_replicas=true")
    hashes = [row["hashes"] for row in rows(folder, "replica_hash")]
    assert len(hashes) == 6 and all(len({*of_ranks}) == 1 for of_ranks in hashes)
    parameters = rows(folder, "started")[0]["parameters"]
    sent = [row["bytes_sent"] for row in rows(folder, "rank_step")]
    # Two ranks, each: half of the gradient, and half of the sums; what else a step tells is small.
    assert 1.0156 < statistics.median(sent) / parameters < 1.02


@pytest.mark.soak
@pytest.mark.parametrize(
    "keys",
    [["cluster.ranks=2", "training.sample_tokens=0"], ["model=mlp", "data=digits"]],
    ids=["gpt_tiny", "mlp"],
)
def test_losses_end_within_a_hundredth(tmp_path: Path, keys: list[str]) -> None:
    """Three seeds, default lengths."""
    ratios = []
    for seed in (1, 2, 3):
        found = {
            kind: run(
                tmp_path / f"{kind}{seed}",
                *keys,
                f"seed={seed}",
                f"quantization={kind}",
                "checkpoint=none",
            )
            for kind in ("none", "int8")
        }
        ratios.append(found["int8"] / found["none"])
    assert statistics.mean(ratios) <= 1.01, ratios
