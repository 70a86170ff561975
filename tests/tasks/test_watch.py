"""task=watch and console=dashboard as commands: in a terminal, and where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun.tracking.run_folder import RunFolder
from tests.cli.command import smolrun
from tests.tasks.test_whole_runs import SMALL, finish, start
from tests.tracking.test_past_runs import a_run
from tests.ui.made import SAVED, training, write


def ended_run(folder: Path) -> RunFolder:
    run = a_run(folder / "outputs")
    write(run, [*training(0, 20), SAVED])
    run.write_summary({"status": "done", "exit_code": 0})
    return run


def test_where_there_is_no_terminal_it_prints_lines(tmp_path: Path) -> None:
    run = ended_run(tmp_path)
    ended = smolrun(tmp_path, "task=watch", f"run={run.run_id}")
    assert (ended.code, ended.error) == (0, "")
    assert ended.out.startswith("done")
    assert ended.seen == "['import hydra']"  # no torch, and no textual
    replayed = smolrun(tmp_path, "task=watch", "replay=true", "speed=1000", f"run={run.run_id}")
    assert replayed.code == 0
    assert "step 1/100  loss 4.0000" in replayed.out and "step 11/100  loss 3.9" in replayed.out
    assert "done: unknown steps" in replayed.out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["run=nothing"], "watch.run = nothing: there is no run"),
        (["speed=0"], "watch.speed = 0"),
        (["replay=true", "run=20260131-142501-x-aaaa"], "there is nothing to replay"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path: Path, words: list[str], what: str) -> None:
    a_run(tmp_path / "outputs")
    ended = smolrun(tmp_path, "task=watch", *words)
    assert ended.code == 2 and what in ended.error


def test_a_sweep_has_no_dashboard(tmp_path: Path) -> None:
    ended = smolrun(tmp_path, "-m", "console=dashboard", "seed=1,2")
    assert ended.code == 2 and "task=watch shows one by one" in ended.error


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, folder: Path, *words: str, **env: str) -> None:
        fcntl, pty, termios = [pytest.importorskip(one) for one in ("fcntl", "pty", "termios")]
        self.fd, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "smolrun.cli", *words],
            cwd=folder, stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", **env},
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def until(self, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while what not in self.seen:
            assert time.monotonic() < deadline, self.seen[-3000:]
            if select.select([self.fd], [], [], 1.0)[0]:
                self.seen += self.read()

    def read(self) -> str:
        try:
            return os.read(self.fd, 65536).decode("utf-8", "replace")
        except OSError:  # Linux: the other end is closed
            return ""

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def end(self) -> int:
        """Its exit code; what it still writes is in `seen`."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += self.read()
        while select.select([self.fd], [], [], 0)[0] and (more := self.read()):
            self.seen += more
        return self.process.wait(5)


@contextlib.contextmanager
def on_terminal(folder: Path, *words: str, **env: str) -> Iterator[Terminal]:
    terminal = Terminal(folder, *words, **env)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)


def test_on_a_terminal_it_is_a_dashboard(tmp_path: Path) -> None:
    ended_run(tmp_path)
    with on_terminal(tmp_path, "task=watch", "run=aaaa", NO_COLOR="1") as terminal:
        terminal.until("? keys")
        assert "mini" not in terminal.seen and "step 20/100" in terminal.seen
        styles = {
            number
            for sgr in re.findall(r"\x1b\[([0-9;]*)m", terminal.seen)
            for number in sgr.split(";")
        }
        assert styles <= {"", "0", "1", "39", "49"}, styles  # bold, and the terminal's own colours
        terminal.type("?")
        terminal.until("the run continues")
        terminal.type("q")
        assert terminal.end() == 0
        assert "\x1b[?1049l" in terminal.seen  # the terminal is as it was before
        assert "done" in terminal.seen.rpartition("\x1b[?1049l")[2]


def test_a_dumb_terminal_gets_lines(tmp_path: Path) -> None:
    ended_run(tmp_path)
    with on_terminal(tmp_path, "task=watch", "run=aaaa", TERM="dumb") as terminal:
        assert terminal.end() == 0
    assert "\x1b[?1049h" not in terminal.seen and "done" in terminal.seen


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_run_with_a_dashboard_is_in_the_background(tmp_path: Path) -> None:
    words = [*SMALL, "training.steps=3", "training.sample_tokens=0", "training.eval_every=0"]
    code, out, err = finish(start(tmp_path, *words, "console=dashboard"))
    assert (code, err.count("Traceback")) == (0, 0), err
    (run,) = [path for path in (tmp_path / "outputs").iterdir() if not path.is_symlink()]
    assert json.loads((run / "driver.json").read_text())["has_log"]
    assert "done: 3 steps" in out
