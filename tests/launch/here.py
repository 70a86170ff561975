"""A machine of a cluster that is this one: what `launch.machine.Machine` is over SSH, by subprocess
and copies of files. Its home is a folder of the test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from smolrun.errors import HostError
from smolrun.launch.remote.call import call
from smolrun.launch.remote.connection import Completed, Connection


class HereConnection:
    """Lines of this machine's own shell."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost: str | None = None

    def run(self, command: str, *, data: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """Run a line to its end, with `data` as its stdin."""
        done = subprocess.run(
            command, input=data, capture_output=True, shell=True, timeout=timeout_s
        )
        return Completed(done.returncode, done.stdout, done.stderr)


class HereMachine:
    """`calls` and `puts` tell what was asked of it; `python` runs the scripts."""

    def __init__(self, home: Path, name: str = "mini1", *, python: str = sys.executable) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.connection = HereConnection(name)
        self.home = home.as_posix()
        self.workdir = (home / "work").as_posix()
        self.os = {"win32": "windows", "darwin": "darwin"}.get(sys.platform, "linux")
        self.python = python
        self.spec = SimpleNamespace(name=name, python=python, torch="auto", env={})
        self.calls: list[tuple[str, Any]] = []
        self.puts: list[tuple[str, int]] = []
        self.installed = None
        # Called before a script is run, or a file copied there or fetched; may raise.
        self.before_call: Callable[[str, dict[str, Any]], object] = lambda script, request: None
        self.before_put: Callable[[str], object] = lambda path: None
        self.before_get: Callable[[str], object] = lambda path: None

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """Run a script of on_host/ with the request; its stdin is the whole program."""
        self.calls.append((script, request.get("do")))
        self.before_call(script, request)
        connection = cast(Connection, self.connection)
        return call(connection, self.python, script, request, timeout_s)

    def run(
        self,
        argv: list[str],
        env: dict[str, str] | None = None,
        data: bytes = b"",
        timeout_s: float = 60.0,
    ) -> Completed:
        """Run a command in the machine's home."""
        done = subprocess.run(
            argv, input=data, capture_output=True, cwd=self.home, env=env, timeout=timeout_s
        )
        return Completed(done.returncode, done.stdout, done.stderr)

    def put(
        self, source: Path | bytes, path: str, progress: Callable[[int], None] | None = None
    ) -> None:
        """Copy a file there; its folder must exist."""
        self.before_put(path)
        data = source if isinstance(source, bytes) else source.read_bytes()
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            raise HostError(self.name, f"cannot write {path}: {error.strerror}") from None
        self.puts.append((path, len(data)))
        if progress is not None:
            progress(len(data))

    def get(
        self,
        path: str,
        target: Path,
        progress: Callable[[int], None] | None = None,
        *,
        most_bytes: int,
    ) -> None:
        """Copy a file from there."""
        self.before_get(path)
        try:
            if Path(path).stat().st_size > most_bytes:
                raise HostError(self.name, f"{path} has more than {most_bytes} bytes")
            shutil.copyfile(path, target)
        except OSError as error:
            raise HostError(self.name, f"cannot read {path}: {error.strerror}") from None
        if progress is not None:
            progress(target.stat().st_size)

    def close(self) -> None:
        """Nothing to end."""
