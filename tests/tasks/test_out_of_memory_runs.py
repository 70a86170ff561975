"""A whole run in a control group that is too small for it: what the user is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_machine_memory import limited_group


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_real_run_that_is_too_large_names_the_rank_and_two_remedies(tmp_path: Path) -> None:
    # Two ranks need 1.5 GB at once with these keys; they start with 0.9 GB.
    keys = ["training.global_batch_size=64", "data.sequence_length=256", "checkpoint.every=0"]
    prepare = [*keys, "training.steps=1", "training.global_batch_size=2", "training.eval_batches=1"]
    command = [sys.executable, "-m", "smolrun.cli"]
    subprocess.run([*command, *prepare], cwd=tmp_path, check=True, capture_output=True)
    with limited_group(1100 << 20) as group:
        run = subprocess.run(
            ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command, *keys],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert run.returncode == 3, run.stdout + run.stderr
    summary = json.loads((tmp_path / "outputs/latest/summary.json").read_text())
    reason = summary["reason"]
    print(reason)
    assert "on local may have run out of memory" in reason
    assert "Linux was ending processes because memory was full (it had " in reason
    assert "of 1.1 GB there)" in reason
    assert reason.count("(saves about ") == 2
    assert reason in run.stderr
