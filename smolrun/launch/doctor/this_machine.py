"""This machine as one that can be asked: what `machine.py` is for those over SSH.

The scripts of on_host/ run in this very process.
"""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from smolrun.errors import HostError


class ThisMachine:
    """Answers what a Machine answers, as far as questions go."""

    def __init__(self, name: str, workdir: Path) -> None:
        self.name = name
        self.os = platform.system().lower()
        self.python = sys.executable
        self.home = Path.home().as_posix()
        self.workdir = workdir.as_posix()

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """What on_host/<script>.py answers here; its own deadlines hold."""
        try:
            main = import_module(f"smolrun.launch.on_host.{script}").main
            reply: dict[str, Any] = main(request)
        except (OSError, ValueError) as error:
            raise HostError(self.name, f"{script} failed: {error}") from error
        return reply

    def close(self) -> None:
        """Nothing to end."""
