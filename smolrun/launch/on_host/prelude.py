"""What several scripts of on_host/ use. remote/call.py sends it to the host with every script.

Only the standard library, Python >= 3.8.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import shutil
import subprocess
import time
from typing import Any, Callable

DAY_S = 86_400.0
SLOW_S = 20.0  # for tools that start slowly: PowerShell, nvidia-smi
_CHUNK = 1 << 20


def read(path: str) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # a Wi-Fi interface has the file of its speed and cannot read it
        return ""


def run(*argv: str, any_code: bool = False, timeout_s: float = 10.0) -> str | None:
    """The stripped stdout of a command; None if it cannot run, is late, or its exit code is not 0
    (unless `any_code`)."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode and not any_code:
        return None
    return done.stdout.decode("utf-8", "replace").strip()


def powershell(command: str) -> str:
    """The output of a PowerShell command; empty if it fails."""
    argv = ("powershell", "-NoProfile", "-NonInteractive", "-Command", command)
    return run(*argv, timeout_s=SLOW_S) or ""


def user() -> str | None:
    """Name of this process's user, or its number as text."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a number without a name, in a container
        return str(os.getuid()) if hasattr(os, "getuid") else None


def usable_cores() -> int | None:
    """Cores this process may use, which a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def nearest_folder(path: str) -> str:
    """The path itself, absolute, or the nearest one above it that exists."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def act(
    request: dict[str, Any], actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]
) -> dict[str, Any]:
    """The answer of the action `do`; an OSError becomes `os_error` and `path`."""
    try:
        return actions[request["do"]](request)
    except OSError as error:
        path = str(error.filename or request["root"]).replace("\\", "/")
        return {"os_error": error.strerror or str(error), "path": path}


def drop(request: dict[str, Any]) -> dict[str, Any]:
    """Action: delete the folder of an incomplete delivery."""
    shutil.rmtree(request["incoming"], ignore_errors=True)
    return {}


def sha256(path: str) -> str:
    """sha256 of a plain file; empty for anything else."""
    if os.path.islink(path) or not os.path.isfile(path):
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while True:
            data = file.read(_CHUNK)
            if not data:
                return digest.hexdigest()
            digest.update(data)


def sweep(folder: str, *prefixes: str) -> None:
    """Delete what dead drivers left there under these prefixes more than a day ago."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(prefixes) and age_s(path) > DAY_S:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                try:
                    os.unlink(path)
                except FileNotFoundError:  # another driver renamed it into place
                    pass


def age_s(path: str) -> float:
    """Seconds since the last change; infinite for what is not there."""
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return float("inf")
