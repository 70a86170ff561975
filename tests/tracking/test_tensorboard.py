"""TensorBoard's files are read back by TensorBoard's own reader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from smolrun.errors import ConfigError
from smolrun.events import EvalDone, RankStep, StepDone, TextSample
from smolrun.tracking.tensorboard import TensorBoard
from smolrun.tracking.trackers import make_trackers

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def write(folder: Path, steps: range, loss: float) -> None:
    board = TensorBoard(folder)
    for step in steps:
        board.record(StepDone(step, 1.0, loss + step, 0.5, 1e-3, 10, 99.0, 7, 8, 0.25, 0.125))
        board.record(RankStep(step, 1, 0.25, 0.125, None, 7, 8))
    board.record(EvalDone(steps[-1], 0.5, 9))
    board.record(TextSample(steps[-1], "a", "b"))
    board.close()


def read(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return [(scalar.step, scalar.value) for scalar in reader.Scalars(tag)]


def test_scalars_come_back(tmp_path: Path):
    write(tmp_path / "board", range(3), 4.0)
    assert read(tmp_path / "board", "train/loss") == [(0, 4.0), (1, 5.0), (2, 6.0)]
    assert read(tmp_path / "board", "rank1/compute_s") == [(0, 0.25), (1, 0.25), (2, 0.25)]
    assert read(tmp_path / "board", "eval/loss") == [(2, 0.5)]


def test_a_resumed_run_has_no_step_twice(tmp_path: Path):
    write(tmp_path, range(6), 4.0)
    write(tmp_path, range(4, 8), 100.0)
    steps = [step for step, _ in read(tmp_path, "train/loss")]
    assert steps == list(range(8))
    assert dict(read(tmp_path, "train/loss"))[5] == 105.0


def test_without_the_package_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ConfigError, match=r"pip install 'smolrun\[tensorboard\]'"):
        make_trackers("tensorboard", {}, tmp_path, world_size=1, warn=print, note=print)


def test_neither_torch_nor_wandb_is_loaded_for_it(tmp_path: Path):
    script = f"""
import sys
from pathlib import Path
from smolrun.tracking.trackers import make_trackers
make_trackers("tensorboard", {{}}, Path({str(tmp_path)!r}), world_size=1, warn=print, note=print)
heavy = {{"torch", "wandb", "tensorflow", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_a_disk_that_refuses_is_a_warning(tmp_path: Path):
    warnings: list[str] = []
    (tmp_path / "tensorboard").write_text("in the way")
    made = make_trackers(
        "tensorboard", {}, tmp_path, world_size=1, warn=warnings.append, note=print
    )
    assert made == []
    assert "tracker=tensorboard cannot start" in warnings[0]
