"""task=status: a table of the runs below outputs/: what they do, how far they are, what they keep.

A sweep is one line. Only reads, and starts nothing. A run that another machine drives is asked for
there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from smolrun.config import RunConfig
from smolrun.driver.runs import with_remote
from smolrun.launch.supervisor_events import EXIT_DONE
from smolrun.sanitize import echo
from smolrun.sweep.attach import all_runs, is_sweep, look_at
from smolrun.tracking.formatting import aligned, clock, duration, size
from smolrun.tracking.past_runs import PastRun
from smolrun.tracking.run_folder import OUTPUTS

MOST_RUNS = 20
COLUMNS = ("run", "state", "step", "loss", "tokens/s", "left", "age", "checkpoints")
_UNKNOWN = "-"


def drive(config: RunConfig) -> int:
    """Prints the table, or with status.format=json a list of all that is known; exit code 0."""
    folders = all_runs()
    if config.status.format == "json":
        echo(json.dumps([_plain(run) for run in with_remote([look_at(one) for one in folders])]))
        return EXIT_DONE
    if not folders:
        echo(f"no runs below {OUTPUTS.absolute()} yet; `smolrun` makes one")
        return EXIT_DONE
    _print([row(run) for run in with_remote([look_at(folder) for folder in folders[:MOST_RUNS]])])
    if len(folders) > MOST_RUNS:
        echo(f"and {len(folders) - MOST_RUNS} older ones")
    return EXIT_DONE


def _plain(run: PastRun) -> dict[str, Any]:
    """One run as JSON: the fields of PastRun, its name and its path; times in seconds. Steps of a
    sweep are jobs."""
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    folder = fields.pop("folder")
    kind = "sweep" if is_sweep(folder) else "run"
    return {"run": folder.run_id, "kind": kind, "path": str(folder.path.absolute()), **fields}


def row(run: PastRun) -> tuple[str, ...]:
    """One run as the texts of its columns."""
    done = _UNKNOWN if run.step is None else f"{run.step:,}"
    whole = "" if run.steps is None else f"/{run.steps:,}"
    return (
        run.folder.run_id,
        run.doing,
        f"{done}{whole}{' jobs' if is_sweep(run.folder) else ''}",
        _UNKNOWN if run.loss is None else f"{run.loss:.4f}",
        _UNKNOWN if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
        _UNKNOWN if run.left_s is None else clock(run.left_s),
        duration(run.age_s),
        size(run.checkpoint_bytes) if run.checkpoint_bytes else _UNKNOWN,
    )


def _print(rows: Sequence[Sequence[str]]) -> None:
    """A terminal gets as many columns as fit, but names and states always: a name that is cut is of
    no use to `checkpoint.resume=`."""
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in aligned([COLUMNS, *rows], room, least=2):
        echo(line)
