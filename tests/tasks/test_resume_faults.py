"""Going on when the disk or the user is difficult: full and small disks, and rewinding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.test_resume import RUN, train
from tests.tasks.test_whole_runs import rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    code, _, err = train(folder, *RUN)
    assert code == 0, err
    return folder


@pytest.fixture
def copy(tmp_path: Path, finished: Path) -> Path:
    """The finished run with its last checkpoints, to be hurt."""
    shutil.copytree(finished / "outputs", tmp_path / "outputs", symlinks=True)
    return tmp_path


def limited(folder: Path, *overrides: str) -> tuple[int, str, str]:
    """No process may write a file of more than 300 KiB: a disk that is full for checkpoints."""
    code = (
        "import resource, runpy, signal, sys;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, 300 << 10));"
        "sys.argv = ['smolrun', *sys.argv[1:]];"
        "runpy.run_module('smolrun.cli', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
@pytest.mark.timeout(120)
def test_a_disk_that_is_full_does_not_end_training_but_is_not_silent(tmp_path: Path) -> None:
    code, out, err = limited(tmp_path, *RUN, "staleness.bound=auto", "training.steps=8")
    assert code == 3, out
    assert "the checkpoint after 3 steps could not be written: rank" in out
    assert "File too large" in out and "training continues" in out
    assert len(rows(tmp_path, "step")) == 8
    assert "the checkpoint after 8 steps could not be written" in err
    told: dict[str, Any] = json.loads((tmp_path / "outputs/latest/summary.json").read_text())
    assert told["status"] == "failed" and "could not be written" in told["reason"]
    assert list((tmp_path / "outputs" / "latest" / "checkpoints").iterdir()) == []


@pytest.mark.soak
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root on Linux can mount a small disk"
)
@pytest.mark.timeout(120)
def test_a_disk_that_is_too_small_is_told_before_the_first_step(tmp_path: Path) -> None:
    disk = tmp_path / "outputs"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "smolrun-test", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        code, _, err = train(tmp_path, *RUN, "staleness.bound=auto")
        assert code == 3
        assert "checkpoints need" in err and "task=clean" in err
        assert not (disk / "latest").exists()  # points to runs that have made a step
        assert train(tmp_path, *RUN, "staleness.bound=auto", "checkpoint.every=0")[0] == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_rewinding_twice_never_mixes_two_timelines(copy: Path) -> None:
    run = (copy / "outputs" / "latest").resolve()
    for attempt in ("", "2"):
        code, out, err = train(
            copy, f"checkpoint.resume={run}/checkpoints/step-00000021", "training.steps=23"
        )
        assert code == 0, err
        if attempt == "":
            assert "step-00000024.set-aside" in out
        checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
        assert "step-00000023" in checkpoints and "step-00000024" not in checkpoints
        assert [row["step"] for row in rows(copy, "step")] == list(range(23))
    assert "step-00000023.set-aside" in checkpoints
