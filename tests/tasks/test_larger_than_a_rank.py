"""A model that no rank could hold with its optimizer, trained by three ranks with fsdp, or in four
stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.tasks.capped_ranks import CappedRanks
from tests.tasks.test_whole_runs import rows, summary

GB = 1 << 30
SHORT = [
    "data.max_mb=1",
    "training.micro_batch_size=1",
    "training.eval_batches=1",
    "training.sample_tokens=0",
    "training.steps=3",
    "checkpoint=none",
    "tracker.timeline_steps=0",
    "mesh.timeout_s=600",
]
# 1.24 billion parameters in bfloat16, with gradients and lion's means 6.9 GB; a third is 2.3 GB.
LLAMA = ["model=llama32_1b", "precision=bf16_params", "optimizer=lion", "data.sequence_length=16"]
LLAMA += [*SHORT, "training.global_batch_size=3"]
FSDP = ["algorithm=fsdp", "cluster.ranks=3", "algorithm.max_live_buckets=1", "algorithm.prefetch=0"]
CAP = int(5.2 * GB)
# 156 million parameters, with gradients and adamw's moments 2.3 GB; a quarter is 0.6 GB, beside
# 0.3 GB of Python and libraries.
WIDE = ["model=gpt_tiny", "model.layers=12", "model.width=1024", "model.heads=16"]
WIDE += [*SHORT, "data.sequence_length=64", "training.global_batch_size=4"]
STAGES = ["algorithm=mp_pipeline", "cluster.ranks=4"]
STAGE_CAP = int(1.3 * GB)


def run(folder: Path, *keys: str, cap: int) -> tuple[int, str, dict[int, int]]:
    """Exit code, everything said, and the most that each process of a rank held."""
    folder.mkdir()
    command = [sys.executable, "-m", "smolrun.cli", *keys]
    log = folder / "said"
    with log.open("w") as said, CappedRanks(cap) as ranks:
        driver = psutil.Popen(command, cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        try:
            ranks.watch(driver, 1500)
        finally:
            if driver.poll() is None:
                driver.terminate()
                driver.wait(30)
    return driver.returncode, log.read_text(), ranks.peak_pss


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_ranks_train_what_one_cannot_hold(tmp_path: Path) -> None:
    if psutil.virtual_memory().available < 3 * CAP:
        pytest.skip("three ranks below this cap need 15.6 GB of free memory")
    code, said, peaks = run(tmp_path / "cut", *LLAMA, *FSDP, cap=CAP)
    print([f"{peak / GB:.2f} GB" for peak in peaks.values()])
    print([row["time_s"] for row in rows(tmp_path / "cut", "step")], summary(tmp_path / "cut"))
    assert code == 0, said
    assert len(rows(tmp_path / "cut", "step")) == 3
    assert max(peaks.values()) < CAP
    assert_does_not_fit(tmp_path / "whole", *LLAMA, cap=CAP)


def assert_does_not_fit(folder: Path, *keys: str, cap: int) -> None:
    code, said, _ = run(folder, *keys, "algorithm=single", "cluster.ranks=1", cap=cap)
    print(code, said[-2000:])
    assert code == 3
    assert "memory" in said


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_four_stages_train_what_one_rank_cannot_hold(tmp_path: Path) -> None:
    """The cap is less than `single` needs for its weights, gradients and moments alone."""
    if psutil.virtual_memory().available < 4 * STAGE_CAP:
        pytest.skip("four ranks below this cap need 5.2 GB of free memory")
    code, said, peaks = run(tmp_path / "cut", *WIDE, *STAGES, cap=STAGE_CAP)
    print([f"{peak / GB:.2f} GB" for peak in peaks.values()])
    print([row["time_s"] for row in rows(tmp_path / "cut", "step")], summary(tmp_path / "cut"))
    assert code == 0, said
    assert len(rows(tmp_path / "cut", "step")) == 3
    assert max(peaks.values()) < 0.9 * STAGE_CAP
    assert_does_not_fit(tmp_path / "whole", *WIDE, cap=STAGE_CAP)
