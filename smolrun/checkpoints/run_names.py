"""Which run a text means: the newest, a name or a part of one, a job of a sweep, or a path.

outputs/
    latest -> 20260131-142501-fsdp-gpt_tiny-3fa9   latest
    20260131-142501-fsdp-gpt_tiny-3fa9/            its name, or a part that no other run has: 3fa9
    sweeps/
        latest -> 20260201-090000-algorithm-77c0
        20260201-090000-algorithm-77c0/            a sweep: no run, but a folder of runs
            algorithm=fsdp,seed=1/                 77c0/fsdp,seed=1 or latest/algorithm=fsdp,seed=1

Every key that takes a run goes through here. Knows no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from smolrun.checkpoints.find import (
    CHECKPOINTS,
    STEP_FOLDER,
    checkpoints_in,
    newest_valid,
    verify,
)
from smolrun.checkpoints.manifest import MANIFEST_FILE
from smolrun.errors import CheckpointError
from smolrun.sanitize import one_line

LATEST = "latest"
SWEEPS = "sweeps"
_MOST_NEWEST, _MOST_CANDIDATES = 5, 20


def locate(text: str, outputs: Path, warn: Callable[[str], None]) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `checkpoint.resume=TEXT` means.

    TEXT is as for `named`. Of a run, the newest valid checkpoint is taken. A checkpoint folder that
    lies in no run's `checkpoints` folder gives its parent as the run folder. Raises CheckpointError
    that names what was searched and which runs exist.
    """
    folder = named(text, outputs)
    if _is_checkpoint(folder):
        verify(folder)
        return _run_of(folder), folder
    newest = newest_valid(folder / CHECKPOINTS, warn)
    if newest is None:
        what = f"the run {one_line(folder.name)} has no checkpoint that can be used"
        raise CheckpointError(f"{what}{what_exists(outputs, with_checkpoints=True)}")
    return folder, newest


def latest_name(outputs: Path) -> str:
    """The name of the run that `latest` points to; empty if there is none."""
    with contextlib.suppress(CheckpointError):
        folder = _target(outputs / LATEST).resolve()
        return folder.name if folder.is_dir() else ""
    return ""


def run_folder(text: str, outputs: Path) -> Path:
    """The run folder that `locate` would return; reads no checkpoint."""
    folder = named(text, outputs)
    return _run_of(folder) if _is_checkpoint(folder) else folder


def named(text: str, outputs: Path) -> Path:
    """The folder of a run, or of a checkpoint, that TEXT means; links are resolved.

    TEXT is "latest", the name of a run below `outputs`, SWEEP/JOB, a path, or a part of a name that
    no other run has, in this order. CheckpointError lists the newest runs, or those that TEXT could
    mean.
    """
    if text == LATEST:
        places = [_target(outputs / LATEST)]
    else:
        places = [outputs / text, outputs / SWEEPS / text, Path(os.path.expanduser(text))]
    there = [path for path in places if text and path.is_dir()]
    if (found := next(filter(_is_run_or_checkpoint, there), None)) is None:
        found = _by_part(text, outputs)
    if found is not None:
        folder = found.resolve()
        return folder.parent if folder.name == CHECKPOINTS else folder
    if there:
        raise CheckpointError(f"{there[0]} is not the folder of a run{what_exists(outputs)}")
    raise CheckpointError(f"there is no run and no checkpoint {text!r}{what_exists(outputs)}")


def sweep_folder(text: str, outputs: Path) -> Path | None:
    """The sweep that TEXT means: "latest", its name, its path, or a part of a name that no other
    sweep has; None if there is none. CheckpointError lists those that TEXT could mean."""
    sweeps = outputs / SWEEPS
    path = _target(sweeps / LATEST) if text == LATEST else Path(os.path.expanduser(text))
    if path.is_dir():
        path = path.resolve()
        if path.parent == sweeps.resolve() or (path / "sweep.yaml").is_file():
            return path
    return _one_of(text, _folders_in(sweeps), "sweeps") if text else None


def runs_below(outputs: Path) -> list[Path]:
    """The folders of all runs, newest first, jobs of sweeps excepted: no links, and with a
    configuration or checkpoints in them."""
    return [path for path in _folders_in(outputs) if _is_run(path)]


def what_exists(outputs: Path, *, with_checkpoints: bool = False) -> str:
    """The newest runs, one a line, for the end of an error."""
    if not outputs.is_dir():
        return f"; there is no folder {outputs.absolute()}: are you where the runs are?"
    runs, which = runs_below(outputs), "the newest"
    if with_checkpoints:
        runs = [path for path in runs if checkpoints_in(path / CHECKPOINTS)]
        which = "the newest with checkpoints"
    if not runs:
        return f"; no run in {outputs} has checkpoints" if with_checkpoints else "; there are none"
    return f"; {which}:{_lines(runs[:_MOST_NEWEST])}"


def _by_part(text: str, outputs: Path) -> Path | None:
    if text in ("", LATEST):
        return None
    sweep, slash, job = text.rpartition("/")
    if slash and (found := sweep_folder(sweep, outputs)) is not None:
        jobs = [path for path in _folders_in(found) if _is_run(path)]
        if (run := _one_of(job, jobs, f"jobs of {found.name}")) is None:
            what = f"the sweep {one_line(found.name)} has no job {job!r}"
            raise CheckpointError(f"{what}; its jobs:{_lines(jobs)}")
        return run
    if (run := _one_of(text, runs_below(outputs), "runs")) is not None:
        return run
    if (found := sweep_folder(text, outputs)) is not None:
        what = f"{text!r} is a sweep, name one of its jobs: {one_line(found.name)}/JOB"
        raise CheckpointError(f"{what}:{_lines(_folders_in(found))}")
    return None


def _one_of(part: str, folders: Sequence[Path], what: str) -> Path | None:
    """The folder of this name, or the only one with this part in its name."""
    found = [path for path in folders if path.name == part]
    found = found or [path for path in folders if part.casefold() in path.name.casefold()]
    if len(found) > 1:
        several = f"{len(found)} {what} have {part!r} in their names, type more of one"
        raise CheckpointError(f"{several}:{_lines(found)}")
    return found[0] if found else None


def _lines(folders: Sequence[Path]) -> str:
    lines = [one_line(path.name) for path in folders[:_MOST_CANDIDATES]]
    if more := len(folders) - len(lines):
        lines.append(f"and {more} more")
    return "".join(f"\n  {line}" for line in lines)


def _folders_in(parent: Path) -> list[Path]:
    """No links and no hidden ones; names begin with the time, so the newest comes first."""
    found = [
        path
        for path in (parent.iterdir() if parent.is_dir() else ())
        if not path.name.startswith(".") and not path.is_symlink() and path.is_dir()
    ]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _is_run_or_checkpoint(folder: Path) -> bool:
    return _is_run(folder) or _is_checkpoint(folder) or folder.resolve().name == CHECKPOINTS


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / CHECKPOINTS).is_dir()


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).exists() or STEP_FOLDER.fullmatch(folder.name) is not None


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint.parent


def _target(pointer: Path) -> Path:
    """What a pointer points to: a link, or a text file where links are not possible."""
    try:
        is_text = pointer.is_file()
        return pointer.parent / pointer.read_text(encoding="utf-8").strip() if is_text else pointer
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{pointer} cannot be read: {error}") from None
