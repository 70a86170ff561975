"""The folder of a sweep: which jobs it has, and the state of each, read from the run folders.

outputs/sweeps/latest -> 20260131-220501-algorithm-precision-3fa9
outputs/sweeps/20260131-220501-algorithm-precision-3fa9/
    sweep.yaml      the jobs, written before the first starts and never again
    driver.json, driver.log, driver.lock, stop, summary.json     as of a run, of the sweep itself
    algorithm=single,precision=bf16/      the run folder of a job; until it starts, its config.yaml
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from smolrun.checkpoints.run_names import LATEST, SWEEPS, sweep_folder
from smolrun.errors import SmolrunError
from smolrun.files import atomic_write, read_yaml
from smolrun.sanitize import all_in_one_line
from smolrun.tracking.past_runs import look
from smolrun.tracking.run_folder import OUTPUTS, RunFolder

MOST_JOBS = 2000
_MAX_BYTES = 8 << 20  # of sweep.yaml: MOST_JOBS with long overrides
JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,-]{0,99}", re.ASCII)
JobState = Literal["waiting", "preparing", "running", "done", "failed", "stopped"]
ENDED: tuple[JobState, ...] = ("done", "failed", "stopped")

_Few = Annotated[int, msgspec.Meta(ge=0, le=MOST_JOBS)]


class SweepJob(msgspec.Struct, frozen=True):
    """One job. `differs`: its values that other jobs do not have, as typed. Jobs of one `cell`
    differ by their seed alone, and `repeat` counts them."""

    name: str
    overrides: list[str]
    differs: dict[str, str]
    cell: _Few
    repeat: _Few = 0


class SweepRecord(msgspec.Struct, frozen=True):
    """sweep.yaml. `started` is a time in ISO format, `overrides` are as typed."""

    id: str
    version: str
    started: str
    overrides: list[str]
    metric: str
    jobs: Annotated[list[SweepJob], msgspec.Meta(min_length=1, max_length=MOST_JOBS)]


@dataclass(frozen=True)
class JobView:
    """One job as its files show it; None is unknown. `wall_s` is that of an ended job."""

    job: SweepJob
    state: JobState
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    wall_s: float | None = None
    reason: str | None = None
    unit: str = "tokens"  # what `tokens_per_s` counts, or "samples"


@dataclass(frozen=True)
class SweepFolder:
    """The files of one sweep."""

    path: Path

    @property
    def run(self) -> RunFolder:
        """The sweep's own driver, lock, stop requests and summary: those of a run."""
        return RunFolder(self.path)

    @property
    def file(self) -> Path:
        """sweep.yaml."""
        return self.path / "sweep.yaml"

    def job(self, name: str) -> RunFolder:
        """The run folder of a job."""
        return RunFolder(self.path / name)

    def write(self, record: SweepRecord) -> None:
        """Write sweep.yaml; OSError."""
        atomic_write(self.file, msgspec.yaml.encode(record))

    def record(self) -> SweepRecord:
        """sweep.yaml, safe to print; SmolrunError for one that cannot be used."""
        try:
            plain = msgspec.yaml.decode(read_yaml(self.file, _MAX_BYTES))
            record = msgspec.convert(all_in_one_line(plain), SweepRecord)
        except (OSError, ValueError, RecursionError) as error:
            raise SmolrunError(f"{self.file} cannot be used: {error}") from None
        names = [job.name for job in record.jobs]
        for name in names:
            # A name is a path below the folder, and nowhere else.
            if not JOB_NAME.fullmatch(name) or (self.path / name).is_symlink():
                raise SmolrunError(f"{self.file} cannot be used: {name[:80]!r} is no name of a job")
        if len({name.lower() for name in names}) < len(names):
            raise SmolrunError(f"{self.file} cannot be used: two jobs have one name")
        return record

    def look(self, job: SweepJob, *, is_alive: bool) -> JobView:
        """The state of a job. `is_alive`: the sweep runs, so a job without an end may go on."""
        folder = self.job(job.name)
        summary = folder.summary()
        status = summary.get("status")
        if status in ENDED:
            return _ended(job, status, summary, folder)
        if not folder.driver_log.exists():
            return JobView(job, "waiting")
        run = look(folder)
        state: JobState = "preparing" if run.step is None else "running"
        if not (is_alive or run.state == "running"):
            state = "stopped"  # the sweep was killed, or the machine went down
        figures = (run.step, run.steps, run.loss, None, run.tokens_per_s, run.left_s)
        return JobView(job, state, *figures, unit=_unit(folder))


def _ended(
    job: SweepJob, state: JobState, summary: Mapping[str, Any], folder: RunFolder
) -> JobView:
    run = look(folder)
    step = _number(summary.get("steps"))
    reason = summary.get("reason")
    return JobView(
        job,
        state,
        step=run.step if step is None else int(step),
        steps=run.steps,
        loss=_number(summary.get("final_train_loss")),
        eval_loss=_number(summary.get("final_eval_loss")),
        tokens_per_s=_number(summary.get("tokens_per_s")) or run.tokens_per_s,
        wall_s=_number(summary.get("wall_s")),
        reason=reason if isinstance(reason, str) else None,
        unit=_unit(folder),
    )


def _unit(folder: RunFolder) -> str:
    return "samples" if folder.driver().get("unit") == "samples" else "tokens"


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def sweep_folders(outputs: Path = OUTPUTS) -> list[SweepFolder]:
    """All sweeps, newest first: folders, no links, with a sweep.yaml in it."""
    folder = outputs / SWEEPS
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in paths if _is_sweep(path) and path.name != LATEST]
    return [SweepFolder(path) for path in sorted(found, key=lambda p: p.name, reverse=True)]


def _is_sweep(path: Path) -> bool:
    return (
        not path.name.startswith(".") and not path.is_symlink() and (path / "sweep.yaml").is_file()
    )


def find_sweep(wanted: str, outputs: Path = OUTPUTS) -> SweepFolder | None:
    """The sweep that `wanted` means, as checkpoints/run_names.py reads it; None if there is none.
    CheckpointError lists those that it could mean."""
    path = sweep_folder(wanted, outputs)
    if path is None or not (path / "sweep.yaml").is_file():
        return None
    is_here = path.parent == (outputs / SWEEPS).resolve()
    return SweepFolder(outputs / SWEEPS / path.name if is_here else path)


def version() -> str:
    """Of the installed smolrun."""
    return importlib.metadata.version("smolrun")
