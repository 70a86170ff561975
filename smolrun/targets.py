"""The `target` of a model, data or algorithm: what its `module:name` names, and its arguments."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from smolrun.errors import ConfigError


def keywords(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a target: its section without `name` and `target`."""
    return {key: value for key, value in section.items() if key not in ("name", "target")}


def model_keywords(section: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model, whose `loss` is no argument of its target."""
    return {key: value for key, value in keywords(section).items() if key != "loss"}


def load_target(path: str) -> Any:
    """What `module:name` names; ConfigError with the reason where it cannot be had."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # an import runs the user's code: it may raise all
        reason = f"{type(error).__name__}: {error}{_place(error)}"
        raise ConfigError(f"{path}: cannot be loaded ({reason})") from error


def _place(error: BaseException) -> str:
    """Where in the user's code an import broke: ` at file:line`, or nothing if not in a file."""
    if isinstance(error, SyntaxError):  # its own message names the line, not the folder
        return f" at {error.filename}:{error.lineno}"
    steps = traceback.extract_tb(error.__traceback__)[1:]  # without our own call
    mine = [step for step in steps if _is_users(step.filename)]
    return f" at {mine[-1].filename}:{mine[-1].lineno}" if mine else ""


def _is_users(file: str) -> bool:
    """Whether a file is one, and neither Python's nor that of an installed package."""
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    return not file.startswith(("<", *(f"{folder}{os.sep}" for folder in installed)))
