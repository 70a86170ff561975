"""cluster=nearby and task=join as users start them: real processes, each with a home of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.tasks.test_whole_runs import SMALL
from tests.waiting import until

START_S = 100.0  # to import torch and prepare the data, beside other work


class Process:
    """`smolrun WORDS` in `folder`, which is its home too; `out` is what it has said so far."""

    def __init__(self, folder: Path, *words: str, stdin: str | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._log = folder / "out.txt"
        cache = folder.parent / "cache"  # the data is prepared once for all tests of a folder
        homes = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config")}
        environment = {**os.environ, **homes, "XDG_CACHE_HOME": str(cache), "NO_COLOR": "1"}
        with self._log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-u", "-m", "smolrun.cli", *words],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
            )
        if stdin is not None:
            self.type(stdin)

    @property
    def out(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def type(self, text: str) -> None:
        """A line of stdin."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{text}\n")
        self.popen.stdin.flush()

    def until_it_says(self, text: str, times: int = 1, timeout_s: float = START_S) -> re.Match[str]:
        """Until its output has so many matches of `text`; the last of them."""

        def said() -> list[re.Match[str]]:
            return list(re.finditer(text, self.out))

        try:
            until(lambda: len(said()) >= times, timeout_s)
        except AssertionError:
            raise AssertionError(f"it has not said {text!r}:\n{self.out}") from None
        return said()[times - 1]

    def wait(self, timeout_s: float = START_S) -> int:
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended:\n{self.out}") from None

    def interrupt(self) -> int:
        self.popen.send_signal(signal.SIGINT)
        return self.wait(30.0)

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait(30.0)
        if self.popen.stdin is not None:
            with contextlib.suppress(OSError):
                self.popen.stdin.close()


class Nearby:
    """A coordinator and those that join it by its address, so that no multicast is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[Process] = []

    def begin(self, *words: str, ranks: int = 2) -> Process:
        """The coordinator; returns once it shows its code."""
        folder = self._folder / "laptop"
        common = ["cluster=nearby", f"cluster.ranks={ranks}", *SMALL]
        begun = self._started(Process(folder, *common, *words))
        begun.until_it_says("pairing code: ")
        return begun

    def join(
        self, begun: Process, name: str = "pi5", *words: str, code: str | None = None
    ) -> Process:
        """A machine that joins; another code than the one that is shown, if given."""
        port = re.findall(r"join\.address=\S+:(\d+)", begun.out)[-1]
        shown = re.findall(r"pairing code: (\S+)", begun.out)[-1]
        address = f"join.address=127.0.0.1:{port}"
        joiner = Process(self._folder / name, "task=join", address, *words, stdin=code or shown)
        return self._started(joiner)

    def _started(self, process: Process) -> Process:
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.close()


@contextlib.contextmanager
def nearby(folder: Path) -> Iterator[Nearby]:
    """All processes are ended with the block."""
    begun = Nearby(folder)
    try:
        yield begun
    finally:
        begun.close()
