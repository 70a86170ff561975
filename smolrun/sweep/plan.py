"""The jobs of a grid: their order, their seeds and their names. Pure: knows of no files.

-m algorithm=single,classicdp training.steps=5 sweep.repeats=2

algorithm=single,seed=0        cell 0  repeat 0     all cells of a repeat have one seed, so they
algorithm=classicdp,seed=0     cell 1  repeat 0     train on the same samples; repeats follow
algorithm=single,seed=1        cell 0  repeat 1     each other, so that a machine that grows
algorithm=classicdp,seed=1     cell 1  repeat 1     slower does so for all cells alike

Cells that differ by a typed seed alone are repeats too, in the order of the grid.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence

from smolrun.tracking.sweep_folder import SweepJob

# Windows allows 260 characters for a path, and a checkpoint's files lie three folders deeper.
_LONGEST_NAME = 80
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+", re.ASCII)


def plan(cells: Sequence[Sequence[str]], seeds: Sequence[int], repeats: int) -> list[SweepJob]:
    """The jobs, in the order in which they run: all cells of a repeat, then those of the next.

    `cells` are the overrides of each cell of the grid, `seeds` their seeds in repeat 0.
    """
    values = [dict(_split(line) for line in cell) for cell in cells]
    keys = list(dict.fromkeys(key for cell in values for key in cell))
    varying = [key for key in keys if len({cell.get(key) for cell in values}) > 1]
    cells_of: dict[tuple[tuple[str, str], ...], list[int]] = {}  # without the seed
    for number, cell in enumerate(values):
        key = tuple(sorted(item for item in cell.items() if item[0] != "seed"))
        cells_of.setdefault(key, []).append(number)
    places = {
        number: (place, repeat)
        for place, numbers in enumerate(cells_of.values())
        for repeat, number in enumerate(numbers)
    }
    jobs = []
    for again in range(repeats):
        for number, (cell, overrides) in enumerate(zip(values, cells, strict=True)):
            differs = {key: cell[key] for key in varying if key in cell}
            words = list(overrides)
            if repeats > 1:
                seed = str(seeds[number] + again)
                differs["seed"] = seed
                words = [line for line in words if _split(line)[0] != "seed"] + [f"seed={seed}"]
            place, repeat = places[number]
            jobs.append((words, differs, place, repeat + again))
    names = _unique([_name(differs) for _, differs, _, _ in jobs])
    return [SweepJob(name, *job) for name, job in zip(names, jobs, strict=True)]


def title(jobs: Sequence[SweepJob]) -> str:
    """What a sweep is about: the keys that differ, by their last parts."""
    keys = dict.fromkeys(key.rpartition(".")[2] for job in jobs for key in job.differs)
    return "-".join(keys)[:60] or "one_job"


def free_name(differs: dict[str, str], taken: Sequence[str]) -> str:
    """The name of a job that comes after the others."""
    return _unique([*taken, _name(differs)])[-1]


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _name(differs: dict[str, str]) -> str:
    parts = [f"{key}={_NOT_IN_NAMES.sub('-', text).strip('-')}" for key, text in differs.items()]
    # A name begins with a letter or a digit; `~key` begins otherwise.
    # Windows drops dots at the end of a name.
    return ",".join(parts).lstrip("~._-=,").rstrip(".") or "job"


def _unique(names: Sequence[str]) -> list[str]:
    """A name that is too long gets a hash, one that another job has too a number. Two that differ
    by case alone are one folder on Windows and macOS."""
    cut = [name if len(name) <= _LONGEST_NAME else _hashed(name) for name in names]
    counts = Counter(name.lower() for name in cut)
    taken = {name.lower() for name in cut if counts[name.lower()] == 1}
    found = []
    for name in cut:
        if counts[name.lower()] > 1:
            numbered = (f"{name}-{number}" for number in itertools.count(1))
            name = next(one for one in numbered if one.lower() not in taken)
            taken.add(name.lower())
        found.append(name)
    return found


def _hashed(name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"
