"""Runs on a host: which system and Python this is, and a working folder that can be used.

Only the standard library, Python >= 3.8.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from typing import Any

from smolrun.launch.on_host.prelude import usable_cores


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`workdir` is made, relative to the home; `problem` says why it cannot be used, else null."""
    home = os.path.expanduser("~")
    workdir = os.path.join(home, os.path.expanduser(request["workdir"]))
    return {
        "os": platform.system().lower(),
        "cores": usable_cores() or 1,
        "home": _slashed(home),
        "executable": _slashed(sys.executable),
        "workdir": _slashed(os.path.normpath(workdir)),
        "problem": _problem(workdir),
    }


def _problem(workdir: str) -> str | None:
    try:
        os.makedirs(workdir, exist_ok=True)
        # Asking the system for permission says nothing about a disk that is full or read-only.
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _slashed(path: str) -> str:
    return path.replace(os.sep, "/")
