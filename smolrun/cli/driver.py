"""Drivers without a terminal; the process that starts one has composed and resolved the config.

`smolrun --driver`: be one; the configuration comes over stdin (see smolrun/driver/detach.py).
`smolrun --start-driver`: start one here for another machine (driver/remote_driver.py).
"""

from __future__ import annotations

import _thread
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from smolrun.cli.run import BAD_CONFIG, drive
from smolrun.config import validate
from smolrun.errors import ConfigError
from smolrun.files import to_null_device
from smolrun.sanitize import echo


def main() -> int:
    """Drive the run that stdin describes; returns its exit code."""
    if hasattr(signal, "SIGHUP"):  # no terminal of this process can be closed
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's own code, as for the command itself
    try:
        config = validate(msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, Any]))
    except (ConfigError, ValueError) as error:
        echo(f"smolrun: the configuration over stdin cannot be used: {error}", error=True)
        return BAD_CONFIG
    to_null_device(sys.stdin.fileno())
    return drive(config)


def start_main() -> int:
    """Start a driver on this machine as stdin says; what it says, and its run folder, to stdout."""
    from smolrun.driver.detach import FOLDER, start

    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Order)
    has_begun = threading.Event()
    watch = threading.Thread(
        target=_end_with_stdin, args=(has_begun,), name="smolrun-start-driver", daemon=True
    )
    watch.start()
    folder = Path(order.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if order.own is not None:  # the user's modules lie beside the outputs, as they do at home
        shutil.copytree(order.own, folder, dirs_exist_ok=True)
    os.chdir(folder)
    code, run = start(order.config, echo)
    has_begun.set()
    if run is not None:
        print(f"{FOLDER}{run}", flush=True)  # noqa: T201  (a program reads the path as it is)
    return code


def _end_with_stdin(has_begun: threading.Event) -> None:
    """Whoever ordered the run has left before it began, by a Ctrl-C or for good: as if it came
    here. Once the run has begun it may leave."""
    while os.read(0, 4096):  # not sys.stdin: its lock would not survive the end of this process
        pass
    if not has_begun.is_set():
        _thread.interrupt_main()


class _Order(msgspec.Struct):
    """What to start, in which folder, and where the user's own modules lie."""

    config: dict[str, Any]
    folder: str
    own: str | None
