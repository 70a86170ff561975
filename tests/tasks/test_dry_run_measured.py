"""What a dry run promises beside what a real run then takes: within 15 %, the process included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tasks.measured import compare

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells the most memory that a process ever had"
)
SHORT = (
    "training.steps=3",
    "training.eval_every=0",
    "training.eval_batches=1",
    "training.sample_tokens=0",
    "checkpoint.every=0",
)
SIZES = {
    "gpt_tiny": ("training.global_batch_size=64", "data.sequence_length=256"),
    "gpt_small": ("training.global_batch_size=8", "data.sequence_length=512"),
}


@pytest.mark.soak
def test_a_small_run_takes_what_was_promised(tmp_path: Path) -> None:
    found = compare(
        tmp_path, ["model=mlp", "data=digits", "training.global_batch_size=512", *SHORT]
    )
    assert found.ratio == pytest.approx(1.0, abs=0.15)


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("precision", ["float32", "bf16_params"])
@pytest.mark.parametrize("model", ["gpt_tiny", "gpt_small"])
def test_runs_take_what_was_promised(
    tmp_path: Path, model: str, precision: str, recompute: str, optimizer: str
) -> None:
    keys = (f"precision={precision}", f"training.recompute={recompute}", f"optimizer={optimizer}")
    found = compare(tmp_path, [f"model={model}", *SIZES[model], *keys, *SHORT])
    print(f"promised {found.promised / 2**20:.0f} MB, measured {found.measured / 2**20:.0f} MB")
    assert found.ratio == pytest.approx(1.0, abs=0.15)


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("keys", [["mp"], ["mp_pipeline"], ["mp_pipeline", "schedule=gpipe"]])
def test_stages_take_what_was_promised(tmp_path: Path, keys: list[str]) -> None:
    """The largest of three stages."""
    algorithm = [f"algorithm={keys[0]}", *(f"algorithm.{key}" for key in keys[1:])]
    sizes = SIZES["gpt_small"]
    found = compare(tmp_path, ["model=gpt_small", "cluster.ranks=3", *algorithm, *sizes, *SHORT])
    print(f"promised {found.promised / 2**20:.0f} MB, measured {found.measured / 2**20:.0f} MB")
    assert found.ratio == pytest.approx(1.0, abs=0.15)
