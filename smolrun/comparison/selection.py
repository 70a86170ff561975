"""Which runs are compared: by name or path, those of a sweep, or the newest ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smolrun.checkpoints.run_names import LATEST, runs_below, sweep_folder
from smolrun.errors import CheckpointError, ConfigError, SmolrunError
from smolrun.sanitize import one_line
from smolrun.tracking.past_runs import find_run, run_folders
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.sweep_folder import SweepFolder, SweepRecord, sweep_folders

MOST_RUNS = 2000  # as many as a sweep may have
_DEFAULT_METRIC = "final_eval_loss"  # sweep.metric where none was given
_NEWEST = 5  # runs that are compared where nothing is named


@dataclass(frozen=True)
class Job:
    """A run to compare. Of a sweep also how it was planned: the keys that differ, as typed; jobs
    of one `cell` differ by the seed only, and are its repeats; equal repeats share a seed."""

    folder: RunFolder
    name: str
    differs: Mapping[str, str] | None = None
    cell: int | None = None
    repeat: int | None = None


@dataclass(frozen=True)
class Selection:
    """What is compared, and where the result goes. Texts are safe to print."""

    jobs: Sequence[Job]
    out: Path
    title: str
    metric: str | None = None  # the sweep's own
    overrides: Sequence[str] = ()  # the sweep's, as typed
    notes: Sequence[str] = ()


def select(runs: Sequence[str] | str | None, sweep: str | None, outputs: Path) -> Selection:
    """What `compare.runs` and `compare.sweep` name; ConfigError where there is no such thing."""
    if runs is not None and sweep is not None:
        raise ConfigError("compare.runs and compare.sweep: only one of them can be given")
    if sweep is not None:
        return of_sweep(_sweep_named(sweep, outputs))
    if runs is not None:
        return _of_names([runs] if isinstance(runs, str) else runs, outputs)
    if sweeps := sweep_folders(outputs):
        return of_sweep(sweeps[0].path)
    folders = run_folders(outputs)[:_NEWEST]
    if not folders:
        what = f"no runs below {outputs.absolute()} yet; `smolrun` makes one"
        raise ConfigError(f"compare.runs = null: {what}")
    title = (
        f"Comparison of the {len(folders)} newest runs" if len(folders) > 1 else "The newest run"
    )
    return Selection([Job(folder, folder.run_id) for folder in folders], outputs, title)


def _sweep_named(wanted: str, outputs: Path) -> Path:
    try:
        path = sweep_folder(wanted, outputs)
    except CheckpointError as error:
        raise ConfigError(f"compare.sweep = {wanted}: {error}") from error
    if path is not None:
        return path
    names = [one_line(sweep.path.name) for sweep in sweep_folders(outputs)[:_NEWEST]]
    there = f"the newest: {', '.join(names)}" if names else "`smolrun -m` makes one"
    raise ConfigError(
        f"compare.sweep = {wanted}: no such sweep below {outputs.absolute()}; {there}"
    )


def _of_names(texts: Sequence[str], outputs: Path) -> Selection:
    found = list(_found(texts, outputs))
    if len(found) == 1 and isinstance(found[0], SweepFolder):
        return of_sweep(found[0].path)
    jobs: list[Job] = []
    for one in found:
        jobs += [Job(one, one.run_id)] if isinstance(one, RunFolder) else of_sweep(one.path).jobs
    # Beside other runs, the plan of a sweep does not say how they pair.
    jobs = [Job(job.folder, job.name) for job in jobs]
    unique = {job.folder.path.resolve(): job for job in jobs}
    doubled = len(jobs) - len(unique)
    notes = ["A run was named twice; it counts once."] if doubled else []
    title = f"Comparison of {len(unique)} runs" if len(unique) > 1 else jobs[0].name
    return _limited(Selection(list(unique.values()), found[0].path.parent, title, notes=notes))


def _found(texts: Iterable[str], outputs: Path) -> Iterator[RunFolder | SweepFolder]:
    """Names are parted by commas; but names of jobs have commas in them, so the longest part that
    names something is one name."""
    for text in texts:
        words = text.strip().removeprefix("[").removesuffix("]").split(",")
        while words:
            for count in range(len(words), 0, -1):
                name = ",".join(words[:count]).strip().strip("'\"")
                try:
                    yield _find(name, outputs)
                except (CheckpointError, OSError, ValueError) as error:  # or no file can have it
                    if count == 1:
                        raise ConfigError(f"compare.runs = {name}: {error}") from error
                else:
                    words = words[count:]
                    break


def _find(name: str, outputs: Path) -> RunFolder | SweepFolder:
    try:
        return find_run(outputs, name)
    except CheckpointError:
        are_runs = any(name.casefold() in path.name.casefold() for path in runs_below(outputs))
        path = None if are_runs or name == LATEST else sweep_folder(name, outputs)
        if path is None:
            raise
        return SweepFolder(path)


def of_sweep(folder: Path) -> Selection:
    """The jobs of a sweep; those that have not started are in it too."""
    sweep, title = SweepFolder(folder), f"Comparison of sweep {one_line(folder.name)}"
    try:
        record = sweep.record()
    except SmolrunError as error:
        found = [Job(run, run.run_id) for run in run_folders(folder)]
        note = f"{one_line(str(error))[:200]}; these are the runs in its folder"
        return _limited(Selection(found, folder, title, notes=[note]))
    jobs = [
        Job(sweep.job(job.name), job.name, job.differs, job.cell, job.repeat) for job in record.jobs
    ]
    return _limited(Selection(jobs, folder, title, _metric(record), record.overrides))


def _metric(record: SweepRecord) -> str | None:
    """What a sweep was about, if anybody said so: typed, or by a sweeper, which got that figure."""
    words = [word.lstrip("+") for word in record.overrides]
    is_meant = any(word.startswith(("sweep.metric=", "hydra/")) for word in words)
    return record.metric if is_meant or record.metric != _DEFAULT_METRIC else None


def _limited(selection: Selection) -> Selection:
    count = len(selection.jobs)
    if count <= MOST_RUNS:
        return selection
    note = f"Only the first {MOST_RUNS:,} of {count:,} runs are compared."
    return replace(selection, jobs=selection.jobs[:MOST_RUNS], notes=[*selection.notes, note])
