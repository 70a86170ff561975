"""The folder outputs/: where every run writes, and nothing else."""

from __future__ import annotations

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from smolrun.config import RunConfig, has_dedicated_server, ranks, redacted
from smolrun.data.cache import cache_folder
from smolrun.data.prepared import Prepared
from smolrun.driver.prepare import prepare_model, tokenizer_for, with_model
from smolrun.errors import ConfigError, DataError
from smolrun.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from smolrun.data.prepared import Progress

OUTPUTS = Path("outputs")  # below the folder you are in; every run writes here and only here


def prepare_data(config: RunConfig, progress: Progress) -> Prepared:
    """Make the data, and a model that has to be fetched, ready on this machine, or find it so."""
    model = prepare_model(config, progress)
    keys = config.data.keywords()
    if (tokenizer := tokenizer_for(config, model)) is not None:
        keys["tokenizer"] = tokenizer
    cache = cache_folder("data")
    prepared = load_target(config.data.target)(cache, **keys).prepare(progress)
    if not isinstance(prepared, Prepared):
        raise DataError(
            f"{config.data.target}: prepare() returned a {type(prepared).__name__}; it must return "
            "a smolrun.data.prepared.Prepared, which prepare_features and prepare_tokens give"
        )
    return with_model(config, prepared, model)


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


@contextlib.contextmanager
def nothing_started() -> Iterator[None]:
    """A disk that refuses before anything was started is the configuration's problem: exit 2."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {OUTPUTS.absolute()}: {error}") from error


def make_folder(config: RunConfig, title: str, tokenizer: str | None = None) -> RunFolder:
    """A fresh run folder with the resolved configuration in it."""
    folder = RunFolder.create(OUTPUTS, config.run_name or title, now=datetime.now())
    folder.write_config(msgspec.yaml.encode(redacted(config)).decode())
    if tokenizer is not None:
        folder.keep_tokenizer(Path(tokenizer))
    return folder


def become_latest(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Let outputs/latest point to the run; a system that cannot do that gets a warning.

    A run that lies elsewhere and goes on there changes nothing here, nor there.
    """
    if folder.path.parent.resolve() != OUTPUTS.resolve():
        return
    try:
        folder.become_latest()
    except OSError as error:
        say(f"warning: {OUTPUTS}/latest still points to an older run: {error}")


def server_note(config: RunConfig) -> list[str]:
    """A line about rank 0 where it computes no samples."""
    if not has_dedicated_server(config):
        return []
    where = ranks(config)[0].host
    return [f"rank 0 on {where} is the parameter server (algorithm.server_trains=false)"]
