"""cluster.restart with real ranks that are killed: what is trained, told, and left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from smolrun.checkpoints.find import newest_valid
from tests.tasks.test_resume import RUN, assert_same, begin, state_of, steps_told
from tests.tasks.test_whole_runs import finish, is_alive, rows, start, summary
from tests.waiting import until

RESTART = "cluster.restart={max: 2, wait_s: 5}"


DIES = """
import time
from pathlib import Path

import psutil
from smolrun.algorithms.classicdp import ClassicDP

MARK, MANIFESTS = Path({mark!r}), {manifests!r}


class Dies(ClassicDP):
    \"\"\"Rank 0 of the first start is killed in its 9th step, once a checkpoint is there.\"\"\"

    steps = 0

    def __init__(self, context):
        super().__init__(context, bucket_mb=1.0)

    def forward_backward(self, micro_batches):
        self.steps += 1
        if self.steps == 9 and self.context.mesh.rank == 0 and not MARK.exists():
            while MANIFESTS and not list(MARK.parent.glob(MANIFESTS)):
                time.sleep(0.01)
            MARK.touch()
            psutil.Process().kill()
        return super().forward_backward(micro_batches)
"""


def newest(saved: Path) -> Path | None:
    return newest_valid(saved, pytest.fail)


def kill_a_rank(run: subprocess.Popen[str], number: int) -> psutil.Process:
    ranks = sorted(psutil.Process(run.pid).children(), key=lambda child: child.pid)
    assert len(ranks) == 2
    ranks[number].kill()
    return ranks[number]


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_two_losses_cost_steps_but_not_the_result(tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    (tmp_path / "hurt").mkdir()
    assert finish(begin(tmp_path / "calm"))[0] == 0
    run = start(tmp_path / "hurt", *RUN, RESTART)
    for number, steps in ((1, 8), (0, 17)):
        until(lambda steps=steps: steps_told(tmp_path / "hurt") >= steps, 60)  # type: ignore[misc]
        killed = kill_a_rank(run, number)
        until(lambda killed=killed: not is_alive(killed))  # type: ignore[misc]
        # The next start has its ranks: until then there is nobody to be killed.
        until(lambda: len(psutil.Process(run.pid).children()) == 2 or run.poll() is not None, 30)
    code, out, err = finish(run)
    assert code == 0, err
    assert_same(state_of(tmp_path / "calm"), state_of(tmp_path / "hurt"))
    assert [row["step"] for row in rows(tmp_path / "hurt", "step")] == list(range(24))
    told = summary(tmp_path / "hurt")
    assert (told["status"], told["exit_code"], told["steps"]) == ("done", 0, 24)
    assert len(told["restarts"]) == 2
    for row in told["restarts"]:  # which of the two it was, process ids do not tell
        assert f"rank {row['lost_rank']} on local died from signal 9" in row["reason"]
        assert row["resumed_from"] % 3 == 0 and row["hosts"] == ["local"]
        assert row["lost_steps"] == row["step"] - row["resumed_from"] >= 0
    assert "; restart 1 of 2 after step" in out and "; restart 2 of 2 after step" in out
    assert "the run was restarted 2 times" in out and err == ""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("every", [3, pytest.param(0, marks=pytest.mark.soak)])
def test_a_loss_is_followed_by_a_start_from_the_newest_checkpoint(
    tmp_path: Path, every: int
) -> None:
    manifests = "outputs/*/checkpoints/*/manifest.json" if every else ""
    (tmp_path / "dies.py").write_text(
        DIES.format(mark=str(tmp_path / "died"), manifests=manifests), encoding="utf-8"
    )
    keys = ["algorithm.name=dies", "algorithm.target=dies:Dies", f"checkpoint.every={every}"]
    code, out, err = finish(start(tmp_path, *RUN, *keys, "cluster.restart.max=1"))
    saved = tmp_path / "outputs" / "latest" / "checkpoints"
    assert code == 0, err
    assert (tmp_path / "died").exists()
    assert ("starting over" in out) == (every == 0)
    assert [row["step"] for row in rows(tmp_path, "step")] == list(range(24))
    assert (summary(tmp_path)["restarts"][0]["resumed_from"] > 0) == (every > 0)
    assert bool(newest(saved)) == (every > 0)


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_an_error_of_the_users_code_is_the_end(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from smolrun.algorithms.classicdp import ClassicDP\n"
        "class Mine(ClassicDP):\n"
        "    def train_step(self, *args, **kwargs):\n"
        "        self.made = getattr(self, 'made', 0) + 1\n"
        "        if self.made > 4 and self.context.mesh.rank == 1:\n"
        "            raise ValueError('my own mistake')\n"
        "        return super().train_step(*args, **kwargs)\n"
    )
    mine = ["algorithm.target=mine:Mine", "algorithm.bucket_mb=1"]
    code, out, err = finish(start(tmp_path, *RUN, RESTART, *mine))
    assert code == 3
    assert "my own mistake" in err and "restart 1" not in out
    assert summary(tmp_path)["restarts"] == []


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for others")
@pytest.mark.timeout(120)
def test_ctrl_c_after_a_loss_means_no_new_start(tmp_path: Path) -> None:
    """It comes while the driver still listens to what the others have to say about the loss."""
    run = start(tmp_path, *RUN, RESTART, "training.steps=100000")
    until(lambda: steps_told(tmp_path) >= 8, 60)
    lost = kill_a_rank(run, 1)
    until(lambda: not is_alive(lost))
    os.kill(run.pid, signal.SIGINT)
    code, out, err = finish(run)
    assert code in (3, 130), err
    assert "restart 1 of 2" not in out and summary(tmp_path)["restarts"] == []
