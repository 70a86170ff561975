"""The folder outputs/: where every run writes, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

import msgspec

from smolrun.config import RunConfig, redacted
from smolrun.errors import ConfigError
from smolrun.tracking.run_folder import OUTPUTS, RunFolder


@contextlib.contextmanager
def nothing_started() -> Iterator[None]:
    """An OSError before anything was started is a ConfigError: exit code 2."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {OUTPUTS.absolute()}: {error}") from error


# The folder of the run of this process, where it is a job of a sweep.
JOB_FOLDER: ContextVar[Path | None] = ContextVar("JOB_FOLDER", default=None)


def make_folder(config: RunConfig, title: str, tokenizer: str | None = None) -> RunFolder:
    """A fresh run folder, or that of the job, with the resolved configuration in it."""
    if (place := JOB_FOLDER.get()) is not None:
        folder = RunFolder(place)
        folder.logs.mkdir(exist_ok=True)
    else:
        folder = RunFolder.create(OUTPUTS, config.run_name or title, now=datetime.now())
    folder.write_config(msgspec.yaml.encode(redacted(config)).decode())
    if tokenizer is not None:
        folder.keep_tokenizer(Path(tokenizer))
    return folder


def become_latest(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Let outputs/latest point to the run; a system that cannot do that gets a warning.

    A resumed run outside outputs/ leaves it as it is.
    """
    if folder.path.parent.resolve() != OUTPUTS.resolve():
        return
    try:
        folder.become_latest()
    except OSError as error:
        say(f"warning: {OUTPUTS}/latest still points to an older run: {error}")
