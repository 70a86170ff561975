"""Which runs are compared: by name or path, those of a sweep, or the newest ones.

outputs/20261201-233000-classicdp-gpt_tiny-3fa9/    a run
outputs/sweeps/20261201-233000-algorithm-3fa9/      a sweep
    sweep.yaml                                      its jobs, as they were planned
    algorithm=fsdp,cluster=sim-pi3,seed=1/          a job: a run too
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from smolrun.comparison.run_figures import UNREADABLE
from smolrun.errors import ConfigError
from smolrun.files import read_yaml
from smolrun.sanitize import one_line
from smolrun.tracking.past_runs import run_folders
from smolrun.tracking.run_folder import LATEST, RunFolder

SWEEPS = "sweeps"
PLAN = "sweep.yaml"
MOST_RUNS = 2000
_NEWEST = 5  # runs that are compared where nothing is named
_MOST_NAMED = 10  # in an error message


@dataclass(frozen=True)
class Job:
    """A run to compare. Of a sweep also how it was planned: the keys that differ, as typed; jobs
    with one `pair` differ by the seed only, and are its repeats; equal repeats share a seed."""

    folder: RunFolder
    name: str
    differs: Mapping[str, str] | None = None
    pair: int | None = None
    repeat: int | None = None


@dataclass(frozen=True)
class Selection:
    """What is compared, and where the result goes."""

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
        return of_sweep(_sweep_folder(sweep, outputs))
    if runs is not None:
        return _named(runs, outputs)
    newest = _newest_sweep(outputs)
    if newest is not None:
        return of_sweep(newest)
    folders = run_folders(outputs)[:_NEWEST]
    if not folders:
        what = f"no runs below {outputs.absolute()} yet; `smolrun` makes one"
        raise ConfigError(f"compare.runs = null: {what}")
    title = f"The {len(folders)} newest runs" if len(folders) > 1 else "The newest run"
    return Selection([Job(folder, folder.run_id) for folder in folders], outputs, title)


def _named(runs: Sequence[str] | str, outputs: Path) -> Selection:
    texts = [runs] if isinstance(runs, str) else list(runs)
    found = list(_places(texts, outputs))
    if len(found) == 1 and not is_run(found[0]):
        return of_sweep(found[0])
    jobs: list[Job] = []
    for path in found:
        jobs += [Job(RunFolder(path), path.name)] if is_run(path) else of_sweep(path).jobs
    unique = {job.folder.path.resolve(): job for job in jobs}
    doubled = len(jobs) - len(unique)
    notes = [f"{doubled} of the runs were named twice; each counts once"] if doubled else []
    jobs = list(unique.values())
    title = f"{len(jobs)} runs" if len(jobs) > 1 else one_line(jobs[0].name)
    # From a sweep only some jobs, or jobs beside other runs: the plan no longer says how they pair.
    jobs = [Job(job.folder, job.name) for job in jobs]
    return Selection(jobs, found[0].parent, title, notes=notes)


def _places(texts: Sequence[str], outputs: Path) -> Iterator[Path]:
    """Names of jobs have commas in them, so as much as names a run is one name."""
    for text in texts:
        words = text.strip().removeprefix("[").removesuffix("]").split(",")
        while words:
            for count in range(len(words), 0, -1):
                name = ",".join(words[:count]).strip().strip("'\"")
                if (path := find(name, outputs)) is not None:
                    yield path
                    words = words[count:]
                    break
            else:
                raise _unknown("compare.runs", words[0].strip(), outputs)


def find(name: str, outputs: Path) -> Path | None:
    """The run or sweep of this name, path, or unique part of a name; None where there is none.
    ConfigError where several names have the part."""
    if not name:
        return None
    paths = [outputs / name, outputs / SWEEPS / name, Path(name).expanduser()]
    if name == LATEST:
        paths = [_pointed_to(outputs)]
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if is_run(path) or is_sweep(path):
                return path.resolve() if path.is_symlink() else path
    known = [folder.path for folder in run_folders(outputs)] + sweep_folders(outputs)
    matching = [path for path in known if name in path.name]
    if len(matching) > 1:
        names = ", ".join(one_line(path.name) for path in matching[:_MOST_NAMED])
        raise ConfigError(f"compare.runs = {one_line(name)}: {len(matching)} have that: {names}")
    return matching[0] if matching else None


def _pointed_to(folder: Path) -> Path:
    """Where `latest` in a folder points: a link, or a text file where links are not possible."""
    pointer = folder / LATEST
    with contextlib.suppress(OSError, ValueError):
        if pointer.is_file() and pointer.stat().st_size < 300:
            return folder / pointer.read_text(encoding="utf-8").strip()
    return pointer


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run."""
    return (path / "config.yaml").is_file()


def is_sweep(path: Path) -> bool:
    """Whether this is the folder of a sweep."""
    return (path / PLAN).is_file()


def sweep_folders(outputs: Path) -> list[Path]:
    """All sweeps, newest first."""
    with contextlib.suppress(OSError):
        found = [p for p in (outputs / SWEEPS).iterdir() if not p.is_symlink() and is_sweep(p)]
        return sorted(found, key=lambda path: path.name, reverse=True)
    return []


def _newest_sweep(outputs: Path) -> Path | None:
    return next(iter(sweep_folders(outputs)), None)


def _sweep_folder(wanted: str, outputs: Path) -> Path:
    path = _newest_sweep(outputs) if wanted == LATEST else find(wanted, outputs)
    if path is None or not is_sweep(path):
        raise _unknown("compare.sweep", wanted, outputs)
    return path


def _unknown(key: str, wanted: str, outputs: Path) -> ConfigError:
    paths = [*sweep_folders(outputs), *(folder.path for folder in run_folders(outputs))]
    names = [one_line(path.name) for path in paths[:_MOST_NAMED]]
    there = f"there are {', '.join(names)}" if names else "`smolrun` makes one"
    what = f"no such run or sweep below {outputs.absolute()}; {there}"
    return ConfigError(f"{key} = {one_line(wanted)}: {what}")


def of_sweep(folder: Path) -> Selection:
    """The jobs of a sweep; those that have not started are in it too."""
    plan, notes = _plan(folder), []
    jobs = list(_planned(folder, plan))
    if not jobs:
        notes.append(f"{PLAN} names no jobs: these are the runs in the folder")
        jobs = [Job(run, run.run_id) for run in run_folders(folder)]
    if len(jobs) > MOST_RUNS:
        notes.append(f"only the first {MOST_RUNS:,} of {len(jobs):,} jobs are compared")
    metric = plan.get("metric")
    typed = plan.get("overrides")
    return Selection(
        jobs[:MOST_RUNS],
        folder,
        f"Sweep {one_line(folder.name)}",
        metric if isinstance(metric, str) else None,
        [one for one in typed if isinstance(one, str)] if isinstance(typed, list) else [],
        notes,
    )


def _plan(folder: Path) -> dict[str, Any]:
    try:
        found = msgspec.yaml.decode(read_yaml(folder / PLAN))
    except UNREADABLE:
        return {}
    return found if isinstance(found, dict) else {}


def _planned(folder: Path, plan: Mapping[str, Any]) -> Iterator[Job]:
    jobs = plan.get("jobs")
    for entry in jobs if isinstance(jobs, list) else []:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _is_inside(folder, name):
            continue
        differs = entry.get("differs")
        typed = (
            {one_line(str(key))[:100]: one_line(str(value))[:100] for key, value in differs.items()}
            if isinstance(differs, dict)
            else None
        )
        pair, repeat = entry.get("pair"), entry.get("repeat")
        yield Job(
            RunFolder(folder / name),
            one_line(name),
            typed,
            pair if isinstance(pair, int) else None,
            repeat if isinstance(repeat, int) else None,
        )


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name is that of a folder right in `folder`, and no link to elsewhere."""
    is_name = 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\:\0")
    return is_name and not (folder / name).is_symlink()
