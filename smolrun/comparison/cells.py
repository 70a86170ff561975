"""Jobs as rows of a comparison: which keys differ, and which runs are repeats of one another.

A cell is one configuration; runs that differ from it by the seed only are its repeats, and repeats
of two cells with one seed are a pair.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from smolrun.comparison.run_figures import RunFigures
from smolrun.comparison.selection import Job

SEED = "seed"
_UNKNOWN = "?"
_ABSENT = "-"
# Keys that say nothing about how a model was trained.
_OTHER = re.compile(
    r"(attach|bench|chat|compare|doctor|export|generate|serving|status|stop|sweep|tracker|trust|watch)\b.*"
    r"|task|run_name|detach|console|driver|checkpoint\.(resume|trust_run_folder|keep)"
    r"|training\.(dry_run|sample_\w+)|cluster\.(start|connect)_timeout_s|cluster\.ssh_config"
)
# A value that follows from another key's is no difference of its own.
_FOLLOWS = {"training.warmup_steps": "training.steps"}
_WORD = re.compile(r"[A-Za-z][\w./-]*", re.ASCII)
_SAYS_NOTHING = frozenset(["none", "null", "true", "false", "auto", "default"])
_MAX_LABEL = 60
_OF_GROUP = ("name", "kind")  # keys that are the choice of a group


class Repeat(NamedTuple):
    """A run within its cell: its seed, and which of the cell's runs with that seed it is."""

    seed: int
    again: int = 0

    def __str__(self) -> str:
        return f"{self.seed} ({self.again + 1})" if self.again else str(self.seed)


@dataclass(frozen=True)
class Cell:
    """One row. `runs` are the repeats by what pairs them with those of other cells."""

    label: str
    differs: Mapping[str, str]
    runs: Mapping[Repeat, RunFigures]

    @property
    def done(self) -> dict[Repeat, RunFigures]:
        """The repeats that count in a verdict: finished, and not diverged."""
        return {key: r for key, r in self.runs.items() if r.state == "done" and not r.diverged}

    @property
    def is_emulated(self) -> bool:
        """Whether its times are those of emulated machines."""
        return any(run.emulated for run in self.runs.values())


def make_cells(jobs: Sequence[Job], runs: Sequence[RunFigures]) -> tuple[list[str], list[Cell]]:
    """The keys that differ, and the rows in the order of their first job."""
    planned = [job.differs is not None and job.cell is not None for job in jobs]
    rows = list(zip(jobs, runs, strict=True))
    if all(planned):
        found = [(dict(job.differs or {}), job.cell, job.repeat, run) for job, run in rows]
    else:
        keys = differing_keys([run.config for run in runs])
        found = []
        for run in runs:
            absent = _ABSENT if run.config else _UNKNOWN
            found.append(({key: run.config.get(key, absent) for key in keys}, None, None, run))
    groups: dict[tuple[object, ...], list[tuple[dict[str, str], int | None, RunFigures]]] = {}
    for differs, number, repeat, run in found:
        cell: tuple[object, ...] = tuple(sorted(p for p in differs.items() if p[0] != SEED))
        if number is not None:
            cell = (number,)
        elif not run.config:
            cell = (run.name,)  # nothing is known of it: not a repeat of anything
        groups.setdefault(cell, []).append((differs, repeat, run))
    labels: dict[str, int] = {}
    cells = [_cell(group, labels) for group in groups.values()]
    names = dict.fromkeys(key for cell in cells for key in cell.differs)
    return [key for key in names if len(cells) > 1], cells


def _cell(
    group: Sequence[tuple[dict[str, str], int | None, RunFigures]], labels: dict[str, int]
) -> Cell:
    first = group[0][0]
    same = {
        key: value
        for key, value in first.items()
        if key != SEED and all(differs.get(key) == value for differs, _, _ in group)
    }
    runs: dict[Repeat, RunFigures] = {}
    for _, repeat, run in group:
        seed = run.config.get(SEED, "")
        # By the seed, as runs that share one saw the same samples; the plan may not know it.
        number = int(seed) if re.fullmatch(r"\d{1,18}", seed) else repeat or 0
        runs[Repeat(number, sum(key.seed == number for key in runs))] = run
    is_known = any(value != _UNKNOWN for value in same.values())
    label = _label(same) if is_known else next(iter(runs.values())).name
    label = label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 3]}..."
    labels[label] = labels.get(label, 0) + 1
    if labels[label] > 1:
        label = f"{label} ({labels[label]})"
    return Cell(label, same, dict(sorted(runs.items())))


def _label(differs: Mapping[str, str]) -> str:
    """`edp, int8`; with the end of its key where a value alone does not say enough: `lr=0.01`."""
    values = list(differs.values())
    ends = [key.rpartition(".")[2] for key in differs]

    def says_enough(value: str) -> bool:
        is_word = _WORD.fullmatch(value) and value.lower() not in _SAYS_NOTHING
        return bool(is_word) and values.count(value) == 1

    def end(key: str) -> str:
        last = key.rpartition(".")[2]
        return short_key(key) if last in _OF_GROUP or ends.count(last) > 1 else last

    return ", ".join(
        value if says_enough(value) else f"{end(key)}={value}" for key, value in differs.items()
    )


def differing_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys of training whose values are not the same in all configurations (empty ones are not
    known, and do not count), the choices of groups first."""
    known = [config for config in configs if config]
    keys = dict.fromkeys(key for config in known for key in config if not _OTHER.fullmatch(key))
    differing = [key for key in keys if len({config.get(key) for config in known}) > 1]
    kept = [key for key in differing if _is_own(key, known, differing)]
    return sorted(kept, key=lambda key: (key == SEED, not key.endswith(".name"), key))


def _is_own(key: str, configs: Iterable[Mapping[str, str]], differing: Collection[str]) -> bool:
    """Whether a key differs also where the choice that brings its value is the same."""
    choice = _FOLLOWS.get(key, f"{key.partition('.')[0]}.name")
    if key == choice or choice not in differing:
        return True
    values: dict[str | None, set[str | None]] = {}
    for config in configs:
        values.setdefault(config.get(choice), set()).add(config.get(key))
    return any(len(found) > 1 for found in values.values())


def short_key(key: str) -> str:
    """`algorithm.name` as people type it: `algorithm`; so `quantization.kind`. Of a longer key the
    last two words: `emulate.bandwidth_mbps`."""
    group, dot, last = key.partition(".")
    return group if dot and last in _OF_GROUP else ".".join(key.split(".")[-2:])


def unit_of(cells: Iterable[Cell]) -> str:
    """What their throughputs count: tokens, or samples where there is no text."""
    units = dict.fromkeys(run.unit for cell in cells for run in cell.runs.values())
    return " or ".join(units)


def cautions(cells: Sequence[Cell]) -> list[str]:
    """What makes the rows unlike, as sentences."""
    runs = [run for cell in cells for run in cell.runs.values()]
    found = []
    for key, what, why in (
        ("model.name", "models", "losses, speeds and bytes are of different work"),
        ("data.name", "data", "their losses cannot be compared"),
        ("training.global_batch_size", "batch sizes", "a step is not the same work"),
        ("training.steps", "numbers of steps", "final losses and times are of unequal training"),
    ):
        values = dict.fromkeys(run.config[key] for run in runs if key in run.config)
        if len(values) > 1:
            found.append(f"The runs have different {what} ({_list(values)}): {why}.")
    versions = dict.fromkeys(run.version for run in runs if run.version)
    if len(versions) > 1:
        found.append(f"They were made by different versions of smolrun ({_list(versions)}).")
    sizes = dict.fromkeys(str(run.world_size) for run in runs if run.world_size)
    if len(sizes) > 1:
        found.append(f"They have different numbers of ranks ({_list(sizes)}).")
    labels: dict[str, list[str]] = {}
    for cell in cells:
        for run in cell.runs.values():
            for what in _about(run):
                labels.setdefault(what, []).append(cell.label if len(cell.runs) == 1 else run.name)
    return [*found, *(f"{what}: {_list(names, '; ')}." for what, names in labels.items())]


def _about(run: RunFigures) -> Iterable[str]:
    """What is to be known about a run; the same words for all of which it is true."""
    if run.state != "done":
        because = f" ({run.reason})" if run.reason else ""
        state = {"running": "still running", "not started": "not started yet"}.get(
            run.state, run.state
        )
        yield f"Not in the verdict, as {state}{because}"
    elif run.diverged:
        yield f"Not in the verdict, as diverged ({run.reason})"
    if run.state != "not started":
        yield from (f"{problem[:1].upper()}{problem[1:]}" for problem in run.problems)


def _list(values: Iterable[str], mark: str = ", ", most: int = 5) -> str:
    names = list(values)
    return mark.join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
