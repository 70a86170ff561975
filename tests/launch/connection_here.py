"""A connection to this very machine, without SSH: lines go to a shell, as sshd does it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path
from typing import IO

from smolrun.launch.remote.connection import CommandTimeout, Completed, OnBytes
from tests import waiting


class ConnectionHere:
    """`profile` is what the login shell does before every command; `commands` were asked for."""

    def __init__(self, *, profile: str = "", name: str = "box") -> None:
        self.name = name
        self.address = "127.0.0.1"
        self.lost: str | None = None
        self.is_silent = False
        self.commands: list[str] = []
        self._profile = profile
        self._processes: list[ProcessHere] = []

    def run(self, command: str, *, data: bytes = b"", timeout_s: float = 60.0) -> Completed:
        self.commands.append(command)
        argv = ["sh", "-c", f"{self._profile}\n{command}"]
        try:
            done = subprocess.run(argv, input=data, capture_output=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandTimeout(self.name, f"did not end within {timeout_s:g} s") from None
        return Completed(done.returncode, done.stdout, done.stderr)

    def start(self, command: str) -> ProcessHere:
        self.commands.append(command)
        process = ProcessHere(f"{self._profile}\n{command}")
        self._processes.append(process)
        return process

    def put(self, source: Path | bytes, path: str, on_bytes: OnBytes | None = None) -> None:
        data = source if isinstance(source, bytes) else source.read_bytes()
        Path(path).write_bytes(data)
        if on_bytes is not None:
            on_bytes(len(data))

    def get(
        self, path: str, target: Path, on_bytes: OnBytes | None = None, *, most_bytes: int
    ) -> None:
        assert Path(path).stat().st_size <= most_bytes
        shutil.copyfile(path, target)
        if on_bytes is not None:
            on_bytes(target.stat().st_size)

    def lose(self, why: str) -> None:
        """From now on nothing is heard of what runs."""
        self.lost = why
        for process in self._processes:
            process.is_lost = True
            process.close()

    def give_up(self) -> None:
        self.lose("no answer")

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def end_all(self) -> None:
        """At the end of a test: nothing that was started here goes on."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait(20)


class ProcessHere:
    """RemoteProcess by subprocess, in a session of its own, as sshd does it."""

    def __init__(self, line: str) -> None:
        self.is_lost = False
        self.is_closed = False
        self.popen = subprocess.Popen(
            ["sh", "-c", line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def read_out(self) -> bytes:
        return self._read(self.popen.stdout)

    def read_err(self) -> bytes:
        return self._read(self.popen.stderr)

    def _read(self, pipe: IO[bytes] | None) -> bytes:
        assert pipe is not None
        while not self.is_closed:
            if select.select([pipe], [], [], 0.01)[0]:
                return os.read(pipe.fileno(), 65536)
        return b""

    def write(self, data: bytes) -> None:
        assert self.popen.stdin is not None
        if self.is_closed:
            raise BrokenPipeError("closed")
        self.popen.stdin.write(data)

    def close_input(self) -> None:
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError):
            self.popen.stdin.close()

    def wait(self) -> int | None:
        waiting.until(lambda: self.is_closed or self.popen.poll() is not None, 30)
        return None if self.is_lost else self.popen.poll()

    def close(self) -> None:
        # What runs goes on, as over SSH.
        self.close_input()
        self.is_closed = True
