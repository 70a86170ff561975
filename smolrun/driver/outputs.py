"""The folder outputs/: where every run writes, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from smolrun.config import RunConfig, has_dedicated_server, ranks, redacted
from smolrun.errors import ConfigError
from smolrun.tracking.run_folder import OUTPUTS, RunFolder

if TYPE_CHECKING:
    pass


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
