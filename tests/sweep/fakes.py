"""Sweeps whose jobs are stand-ins: they write the files of a run and train nothing."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from smolrun import cli
from smolrun.sweep import runner
from smolrun.tracking.sweep_folder import SweepFolder, find_sweep
from tests.waiting import SOON_S, until

FAKE_JOB = [sys.executable, "-S", "-E", str(Path(__file__).with_name("fake_job.py"))]
Run = Callable[..., int]


def newest() -> SweepFolder:
    """The newest sweep below outputs/."""
    folder = find_sweep("latest")
    assert folder is not None
    return folder


def states() -> list[str]:
    """Of all jobs of the newest sweep."""
    folder = newest()
    return [folder.look(job, is_alive=False).state for job in folder.record().jobs]


def command_with_fakes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Run:
    """`smolrun` in that folder, in this process, with stand-ins for the processes of the jobs."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(runner, "COMMAND", FAKE_JOB)
    monkeypatch.setattr(runner, "_POLL_S", 0.02)

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["smolrun", *arguments])
        return cli.main()

    return command


def says(job: str) -> Callable[[], bool]:
    """Whether a job of the newest sweep has started."""

    def has_started() -> bool:
        folder = find_sweep("latest")
        return folder is not None and "pid" in text_of(folder.job(job).driver_log)

    return has_started


def text_of(path: Path) -> str:
    """A file's text; empty where there is none."""
    return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def meanwhile(act: Callable[[], object], once: Callable[[], bool]) -> Iterator[None]:
    """`act` is called in a thread as soon as `once()` is true."""

    def wait() -> None:
        until(once)
        act()

    thread = threading.Thread(target=wait, name="test-meanwhile", daemon=True)
    thread.start()
    yield
    thread.join(SOON_S)
