"""`smolrun --driver`: a driver without a terminal. Its configuration, composed and resolved by
whoever started it, comes over stdin; see tasks/detach.py."""

from __future__ import annotations

import os
import signal
import sys

import msgspec

from smolrun.cli.run import BAD_CONFIG, drive
from smolrun.config import validate
from smolrun.errors import ConfigError


def main() -> int:
    """Drive the run that stdin describes; returns its exit code."""
    if hasattr(signal, "SIGHUP"):  # no terminal of this process can be closed
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's own code, as for the command itself
    try:
        config = validate(msgspec.json.decode(sys.stdin.buffer.read(), type=dict))
    except (ConfigError, ValueError) as error:
        print(f"smolrun: the configuration over stdin cannot be used: {error}", file=sys.stderr)
        return BAD_CONFIG
    _let_go_of_stdin()
    return drive(config)


def _let_go_of_stdin() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
