"""T8 of the goals on real processes: what a rank of four holds for every parameter, stage by stage.

Two models that differ in the number of their blocks only: what the larger one holds more, divided
by the parameters that it has more, leaves out Python, torch, and what is whole in passing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.tasks.capped_ranks import CappedRanks
from tests.tasks.test_whole_runs import rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells PSS")
KEYS = [
    "algorithm=fsdp",
    "cluster.ranks=4",
    "cluster.threads=1",
    "model=gpt_small",
    "model.width=512",
    "model.heads=8",
    "model.kv_heads=null",
    "data.max_mb=1",
    "data.sequence_length=16",
    "training.global_batch_size=4",
    "training.recompute=true",  # so that activations do not count
    "training.eval_batches=1",
    "training.sample_tokens=0",
    "training.steps=3",
    "checkpoint=none",
    "tracker.timeline_steps=0",
]


def run(folder: Path, *keys: str) -> tuple[int, float]:
    """Parameters, and the most that a rank held, the mean of all ranks."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "smolrun.cli", *KEYS, *keys]
    with (folder / "said").open("w") as said, CappedRanks(None) as ranks:
        driver = psutil.Popen(command, cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        ranks.watch(driver, 300)
    assert driver.returncode == 0, (folder / "said").read_text()
    (started,) = rows(folder, "started")
    return started["parameters"], sum(ranks.peak_pss.values()) / len(ranks.peak_pss)


@pytest.mark.soak
@pytest.mark.timeout(700)
@pytest.mark.parametrize(("stage", "expected"), [(0, 16), (1, 10), (2, 7), (3, 4)])
def test_bytes_per_parameter_of_whole_processes(tmp_path: Path, stage: int, expected: int) -> None:
    (few, small), (many, large) = (
        run(tmp_path / layers, f"algorithm.stage={stage}", f"model.layers={layers}")
        for layers in ("8", "24")
    )
    found = (large - small) / (many - few)
    print(
        f"stage {stage}: {few:,} and {many:,} parameters, {small / 2**20:.0f} and "
        f"{large / 2**20:.0f} MiB: {found:.2f} bytes a parameter"
    )
    assert few > 1e7
    assert found == pytest.approx(expected, rel=0.1)
