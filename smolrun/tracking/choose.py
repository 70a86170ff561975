"""From the answer to `tracker=` to the readers of the events; metrics.jsonl is always written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smolrun.tracking.tensorboard import TensorBoard
from smolrun.tracking.tracker import Tracker
from smolrun.tracking.wandb_run import WandbRun

KINDS = ("jsonl", "tensorboard", "wandb")


def make_trackers(
    kind: str,
    keys: Mapping[str, Any],
    folder: Path,
    *,
    world_size: int,
    warn: Callable[[str], None],
    note: Callable[[str], None],
) -> list[Tracker]:
    """What `tracker=kind` adds to metrics.jsonl, for the run folder `folder`, in which config.yaml
    and metrics.jsonl must be by now.

    ConfigError where a package is missing; whatever else fails is told by `warn`, and the run goes
    on without it.
    """
    try:
        if kind == "tensorboard":
            return [TensorBoard(folder / "tensorboard")]
        if kind == "wandb":
            run = WandbRun(folder, world_size=world_size, warn=warn, note=note, **keys)
            return [run]
    except OSError as error:
        warn(f"tracker={kind} cannot start ({error}); the run goes on without it")
    return []
