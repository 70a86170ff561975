"""detach=true: real drivers in the background, and what they survive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.tasks.background import LONG, in_background
from tests.tasks.test_whole_runs import SMALL, finish, is_alive, start
from tests.waiting import until

posix = pytest.mark.skipif(not hasattr(os, "setsid"), reason="Windows has no sessions")


@pytest.mark.timeout(120)
def test_it_runs_in_a_session_of_its_own_and_ends_by_sigterm(tmp_path: Path) -> None:
    with in_background(tmp_path) as run:
        assert f"smolrun task=attach attach.run={run.run_id}" in run.out
        assert f"smolrun task=stop stop.run={run.run_id}" in run.out
        workers = run.until_it_trains()
        assert len(workers) == 2
        if hasattr(os, "getsid"):
            assert os.getsid(run.driver.pid) == run.driver.pid
        # Nothing of it reaches the environment that workers and other programs see.
        assert "SMOLRUN_DRIVER_LOG" not in workers[0].environ()
        assert "starting 2 ranks" in run.log() and "step 1/50000" in run.log()
        assert not list((tmp_path / "outputs").glob(".driver-*"))
        run.driver.terminate()
        run.until_it_is_gone(workers)
        assert run.read("summary.json")["exit_code"] == 130
        assert "to resume: smolrun checkpoint.resume" in run.log()


@pytest.mark.soak
@posix
@pytest.mark.timeout(120)
def test_a_terminal_that_is_closed_does_not_end_it(tmp_path: Path) -> None:
    """The command runs on a terminal of its own, which then hangs up."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:  # the shell on that terminal, which stays when the command is done
        os.chdir(tmp_path)
        command = [sys.executable, "-m", "smolrun.cli", *LONG, "detach=true"]
        code = subprocess.call(command)
        os.write(1, f"code {code}\n".encode())
        signal.pause()
    shown = b""
    while b"code 0" not in shown:
        data = os.read(terminal, 4096)
        assert data, shown
        shown += data
    run_id = shown.decode().split(" runs in the background")[0].split()[-1]
    path = tmp_path / "outputs" / run_id
    import json

    driver = psutil.Process(json.loads((path / "driver.json").read_text())["pid"])
    try:
        os.close(terminal)  # SIGHUP to all that belong to the terminal
        assert os.waitpid(pid, 0)[1] != 0, "the shell was hung up"
        metrics = path / "metrics.jsonl"
        until(lambda: metrics.exists() and metrics.read_text().count('"event": "step"') > 20, 60)
        assert is_alive(driver)
        workers = driver.children()
        driver.kill()
        until(lambda: not any(is_alive(worker) for worker in workers), 20)
    finally:
        if is_alive(driver):
            driver.kill()


def test_an_error_before_the_start_is_shown_with_its_exit_code(tmp_path: Path) -> None:
    code, out, err = finish(
        start(tmp_path, *SMALL, "detach=true", "data=text", "data.path=not_there.txt")
    )
    assert code == 2
    assert "not_there.txt" in err and out == ""
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.soak
@posix
@pytest.mark.timeout(120)
def test_ctrl_c_while_the_data_is_prepared_starts_nothing(tmp_path: Path) -> None:
    code = tmp_path / "slow.py"
    code.write_text(
        "import pathlib, time\n"
        "def build(cache, *, x=1):\n"
        "    pathlib.Path('building').touch()\n"
        "    time.sleep(60)\n"
    )
    run = start(tmp_path, "detach=true", "data.target=slow:build", "model=mlp")
    until(lambda: (tmp_path / "building").exists() or run.poll() is not None, 30)
    drivers = psutil.Process(run.pid).children()
    run.send_signal(signal.SIGINT)
    code_, out, err = finish(run)
    assert code_ == 130, err
    assert "before training began" in err and out == ""
    assert drivers and not any(is_alive(driver) for driver in drivers)
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_run_that_goes_on_may_be_detached_too(tmp_path: Path) -> None:
    first = [*SMALL, "training.steps=3", "training.sample_tokens=0"]
    assert finish(start(tmp_path, *first))[0] == 0
    with in_background(tmp_path, "checkpoint.resume=latest") as run:
        run.until_it_trains()
        assert "resuming after step 3" in run.log()
        assert run.path.is_dir() and len(list((tmp_path / "outputs").glob("2*"))) == 1


@pytest.mark.soak
def test_a_dry_run_stays_here(tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path, *SMALL, "detach=true", "training.dry_run=true"))
    assert code == 0, err
    assert "in the background" not in out and not list(tmp_path.glob("outputs/*"))


AGAIN = """
import sys
from pathlib import Path
from smolrun.driver.detach import begin_driving
from smolrun.tracking.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
said = []
for _ in range(2):
    begin_driving(run, steps=3, unit="tokens")
    said.append(run.driver()["has_log"])
sys.exit(0 if said == [True, True] else 1)
"""


def test_a_run_that_is_started_again_still_has_its_log(tmp_path: Path) -> None:
    log = tmp_path / "driver.log.first"
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, str(tmp_path)],
            env={**os.environ, "SMOLRUN_DRIVER_LOG": str(log)},
            stdout=output,
            timeout=30,
        )
    assert done.returncode == 0
