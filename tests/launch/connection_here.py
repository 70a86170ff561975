"""A connection to this very machine, without SSH: the same shell line, run by a shell like sshd's."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

from smolrun.errors import HostError
from smolrun.launch.connection import Completed, OnBytes


class ConnectionHere:
    """`profile` is what the login shell does before every command; `commands` were asked for."""

    def __init__(self, *, profile: str = "", name: str = "box") -> None:
        self.name = name
        self.address = "127.0.0.1"
        self.lost: str | None = None
        self.commands: list[str] = []
        self._profile = profile
        self._processes: list[ProcessHere] = []

    def run(self, command: str, *, data: bytes = b"", timeout_s: float = 60.0) -> Completed:
        self.commands.append(command)
        argv = ["sh", "-c", f"{self._profile}\n{command}"]
        try:
            done = subprocess.run(argv, input=data, capture_output=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise HostError(self.name, f"did not end within {timeout_s:g} s") from None
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

    def get(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> None:
        shutil.copyfile(path, target)
        if on_bytes is not None:
            on_bytes(target.stat().st_size)

    def lose(self, why: str) -> None:
        """From now on nothing is heard of what runs."""
        self.lost = why
        for process in self._processes:
            process.is_lost = True
            process.close()

    def close(self) -> None:
        for process in self._processes:
            process.close()


class ProcessHere:
    """RemoteProcess by subprocess, in a session of its own, as sshd does it."""

    def __init__(self, line: str) -> None:
        self.is_lost = False
        self.popen = subprocess.Popen(
            ["sh", "-c", line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def read_out(self) -> bytes:
        assert self.popen.stdout is not None
        return self.popen.stdout.read(65536) or b""

    def read_err(self) -> bytes:
        assert self.popen.stderr is not None
        return self.popen.stderr.read(65536) or b""

    def write(self, data: bytes) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(data)

    def close_input(self) -> None:
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError):
            self.popen.stdin.close()

    def wait(self) -> int | None:
        code = self.popen.wait()
        return None if self.is_lost else code

    def close(self) -> None:
        self.close_input()
        self.popen.kill()
