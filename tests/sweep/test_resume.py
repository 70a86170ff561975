"""A sweep that is stopped or killed, and what `sweep.resume` makes of it."""

from __future__ import annotations

import _thread
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from smolrun.cli import sweep
from smolrun.sweep import runner
from tests.sweep.fakes import (
    FAKE_JOB,
    Run,
    command_with_fakes,
    meanwhile,
    newest,
    says,
    states,
    text_of,
)
from tests.waiting import SOON_S, until


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`smolrun` in an empty folder, with stand-ins for the processes of the jobs."""
    return command_with_fakes(monkeypatch, tmp_path)


class _Manifest:
    step = 3


@pytest.fixture
def any_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty folder that a stand-in saves counts as a checkpoint."""

    def newest_of(checkpoints: Path, warn: object) -> Path | None:
        return next(iter(checkpoints.glob("step-*")), None)

    monkeypatch.setattr(sweep, "newest_valid", newest_of)
    monkeypatch.setattr(sweep, "read_manifest", lambda path: _Manifest)


def stop_at(job: str, *arguments: str, run: Run) -> int:
    """The exit code of a sweep that gets a Ctrl-C once this job runs."""
    with meanwhile(_thread.interrupt_main, once=says(job)):
        return run("-m", *arguments)


@pytest.mark.usefixtures("any_checkpoint")
def test_a_stopped_sweep_goes_on_where_it_was(run: Run, capsys: pytest.CaptureFixture[str]):
    names = "run_name=fails-once,ok,waits,fine"
    assert stop_at("run_name=waits", names, "training.steps=5", run=run) == 130
    assert states() == ["failed", "done", "stopped", "waiting"]
    found = newest()
    assert f"smolrun -m sweep.resume={found.path.name}" in capsys.readouterr().err
    done = found.job("run_name=ok").path / "summary.json"
    before = done.stat().st_mtime_ns

    assert run("-m", "sweep.resume=latest") == 0
    out = capsys.readouterr().out
    assert "1 of 4 jobs done, 1 failed, 1 stopped, 1 waiting" in out
    assert "1 failed job will run again" in out
    assert states() == ["done"] * 4
    assert done.stat().st_mtime_ns == before  # it did not run again
    stopped = found.job("run_name=waits")
    assert f"resume {stopped.path} " in text_of(stopped.driver_log)
    again = found.job("run_name=fails-once")
    assert "resume None" in text_of(again.driver_log)
    assert "pid" in text_of(found.path / ".run_name=fails-once.1" / "driver.log")
    assert run("-m", "sweep.resume=latest") == 0  # nothing is left
    assert done.stat().st_mtime_ns == before


@pytest.mark.usefixtures("any_checkpoint")
def test_a_job_whose_resume_fails_before_a_step_resumes_again(run: Run):
    """Nothing is wrong with what it had trained."""
    assert stop_at("run_name=away", "run_name=away,ok", run=run) == 130
    assert run("-m", "sweep.resume=latest") == 3
    assert states() == ["failed", "done"]
    assert run("-m", "sweep.resume=latest") == 0
    folder = newest().job("run_name=away")
    resumes = [line for line in text_of(folder.driver_log).splitlines() if "pid" in line]
    assert [f"resume {folder.path} " in line for line in resumes] == [False, True, True]
    assert not list(newest().path.glob(".run_name*"))  # it did not start over


def test_a_job_without_a_checkpoint_starts_over(run: Run):
    assert stop_at("run_name=waits", "run_name=waits,ok", run=run) == 130
    with meanwhile(
        _thread.interrupt_main,
        once=lambda: len(list(Path().glob("outputs/sweeps/*/.*"))) > 0 and says("run_name=waits")(),
    ):
        assert run("-m", "sweep.resume=latest") == 130
    assert "resume None" in text_of(newest().job("run_name=waits").driver_log)


def test_the_second_ctrl_c_ends_the_job_at_once(run: Run):
    def twice() -> None:
        log = newest().job("run_name=stubborn").driver_log
        _thread.interrupt_main()
        until(lambda: "asked once" in text_of(log))
        newest().run.ask_to_stop()  # counts as one

    with meanwhile(twice, once=says("run_name=stubborn")):
        assert run("-m", "run_name=stubborn,ok") == 131
    assert states() == ["stopped", "waiting"]


def test_a_job_that_does_not_obey_is_killed_and_counts_as_stopped(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runner, "_ABORT_S", 0.1)

    def twice() -> None:
        newest().run.ask_to_stop()
        newest().run.ask_to_stop()

    with meanwhile(twice, once=says("run_name=hangs")):
        assert run("-m", "run_name=hangs,ok") == 131
    assert states() == ["stopped", "waiting"]


def test_task_stop_ends_a_sweep_resumably(run: Run, capsys: pytest.CaptureFixture[str]):
    codes: list[int] = []

    def stop() -> None:
        from smolrun.sweep.attach import stop

        codes.append(stop(newest()))

    with meanwhile(stop, once=says("run_name=waits")):
        assert run("-m", "run_name=waits,ok") == 130
    assert codes == [0]
    assert "stop requested, its job saves at the next agreed step" in capsys.readouterr().out


def test_a_full_disk_ends_the_sweep_resumably(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    launch, started = runner.launch, []

    def full(command: list[str], output: int) -> subprocess.Popen[bytes]:
        started.append(output)
        if len(started) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return launch(command, output)

    monkeypatch.setattr(runner, "launch", full)
    assert run("-m", "run_name=ok,fine,good") == 3
    err = capsys.readouterr().err
    assert "the sweep ends, a job cannot be started: [Errno 28] No space left on device" in err
    assert "to run the other 2 jobs" in err
    assert not newest().run.driver_lives()
    assert run("-m", "sweep.resume=latest") == 0
    assert states() == ["done"] * 3


@pytest.mark.usefixtures("any_checkpoint")
def test_what_is_edited_meanwhile_does_not_change_the_jobs(run: Run, tmp_path: Path):
    own = tmp_path / "conf" / "optimizer"
    own.mkdir(parents=True)
    shipped = Path(sweep.__file__).parents[2] / "conf" / "optimizer" / "sgd.yaml"
    (own / "mine.yaml").write_text(shipped.read_text().replace("lr:", "lr: 0.25 #"))
    words = ["optimizer=mine", "run_name=waits,ok"]
    assert stop_at("run_name=waits", *words, run=run) == 130
    (own / "mine.yaml").write_text(shipped.read_text().replace("lr:", "lr: 0.75 #"))
    assert run("-m", "sweep.resume=latest") == 0
    assert newest().job("run_name=ok").summary()["final_train_loss"] == 2.25


@pytest.mark.parametrize("word", ["training.steps=7", "sweep.repeats=2", "algorithm=single,fsdp"])
def test_a_resumed_sweep_keeps_its_settings(
    run: Run, word: str, capsys: pytest.CaptureFixture[str]
):
    assert run("-m", "seed=1,2") == 0
    assert run("-m", "sweep.resume=latest", word) == 2
    key = word.partition("=")[0]
    assert f"{key}: a resumed sweep keeps its own settings" in capsys.readouterr().err


def test_there_is_no_such_sweep(run: Run, capsys: pytest.CaptureFixture[str]):
    assert run("-m", "sweep.resume=latest") == 2
    assert "sweep.resume = latest: no such sweep below" in capsys.readouterr().err
    assert run("-m", "seed=1") == 0
    assert run("sweep.resume=nonsense") == 2
    assert newest().path.name in capsys.readouterr().err


def damage(change: dict[str, object]) -> None:
    """Change sweep.yaml of the newest sweep."""
    file = newest().file
    file.write_bytes(msgspec.yaml.encode(msgspec.yaml.decode(file.read_bytes()) | change))


def test_a_sweep_of_another_version_is_resumed_with_a_warning(
    run: Run, capsys: pytest.CaptureFixture[str]
):
    assert run("-m", "run_name=fails-once,ok") == 3
    damage({"version": "0.0.1", "a_later_key": [1]})
    assert run("-m", "sweep.resume=latest") == 0
    assert "warning: its first jobs ran on smolrun 0.0.1" in capsys.readouterr().out


def test_a_damaged_sweep_file_is_refused(run: Run, capsys: pytest.CaptureFixture[str]):
    assert run("-m", "seed=1,2") == 0
    damage({"jobs": [{"name": "../../elsewhere", "overrides": [], "differs": {}, "cell": 0}]})
    assert run("-m", "sweep.resume=latest") == 2
    assert "sweep.yaml cannot be used" in capsys.readouterr().err


def test_a_sweep_from_elsewhere_needs_trust(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    assert run("-m", "run_name=fails-once,ok") == 3
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))  # another account's key
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    capsys.readouterr()
    assert run("-m", "sweep.resume=latest") == 2
    err = capsys.readouterr().err
    assert "this account on this machine did not write its config.yaml" in err
    assert "checkpoint.trust_run_folder=true" in err
    assert run("-m", "sweep.resume=latest", "checkpoint.trust_run_folder=true") == 0


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_the_outside_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert run("-m", "run_name=fails,ok") == 3
    log = newest().job("run_name=fails").driver_log
    log.unlink()
    log.symlink_to(tmp_path / "victim")
    assert run("-m", "sweep.resume=latest") == 2
    assert "outside of the run's own folder" in capsys.readouterr().err


SWEEP = """
import sys
from smolrun.sweep import runner
runner.COMMAND = sys.argv[1].split("|")
from smolrun import cli
sys.argv = ["smolrun", "-m", "run_name=waits,ok"]
sys.exit(cli.main())
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sweep in a process of its own, whose first job waits."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", SWEEP, "|".join(FAKE_JOB)]
    started = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until(says("run_name=waits"), 60.0)
    yield started
    started.kill()
    started.communicate(timeout=SOON_S)


def pid_of_job() -> int:
    """Of the waiting job."""
    return int(text_of(newest().job("run_name=waits").driver_log).split()[1])


@pytest.mark.skipif(os.name == "nt", reason="signals of another process are a POSIX matter")
def test_a_terminated_sweep_stops_as_by_ctrl_c(process: subprocess.Popen[str]):
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON_S) == 130
    assert states() == ["stopped", "waiting"]


def test_a_killed_sweep_leaves_no_job(process: subprocess.Popen[str]):
    job = pid_of_job()
    process.kill()
    until(lambda: not psutil.pid_exists(job))
    assert states() == ["stopped", "waiting"]
    assert newest().run.driver_lives() is False


def test_two_processes_cannot_run_one_sweep(
    process: subprocess.Popen[str], run: Run, capsys: pytest.CaptureFixture[str]
):
    assert newest().run.driver_lives()
    assert run("-m", "sweep.resume=latest") == 2
    assert "is still running" in capsys.readouterr().err
    assert newest().run.claim() is False
