"""`smolrun -m`: from the checked jobs of a grid to a sweep, and from a stopped sweep to its rest.

Jobs that train get run folders below outputs/sweeps/; jobs of other tasks, and dry runs, run one
after another on this terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from smolrun.checkpoints.find import newest_valid, read_manifest
from smolrun.checkpoints.run_names import SWEEPS
from smolrun.cli import compose
from smolrun.cli.arguments import Arguments
from smolrun.cli.resume import of_folder, require_trust
from smolrun.config import RunConfig, redacted, resolved, validate
from smolrun.config.suggest import problem
from smolrun.driver.detach import begin_driving
from smolrun.driver.outputs import nothing_started
from smolrun.errors import ConfigError, SmolrunError
from smolrun.launch.wake import keep_awake
from smolrun.sanitize import echo
from smolrun.sweep.plan import plan, title
from smolrun.sweep.runner import ReadyJob, SweepRunner, made_no_step
from smolrun.sweep.table import SweepConsole, SweepProgress, counts_text, ending_lines, left_s
from smolrun.tracking.formatting import counted, duration
from smolrun.tracking.run_folder import OUTPUTS, RunFolder
from smolrun.tracking.sweep_folder import (
    MOST_JOBS,
    JobView,
    SweepFolder,
    SweepJob,
    SweepRecord,
    find_sweep,
    sweep_folders,
    version,
)

MAY_CHANGE = ("sweep.resume", "sweep.fail_fast", "checkpoint.trust_run_folder", "detach")
NO_DASHBOARD = problem(
    "console", "dashboard", "not with -m, whose jobs task=watch shows one by one", allowed="auto"
)
_MOST_NAMED = 5
_MANY = 20  # jobs from which on their time is estimated before the first; it takes some seconds
_MOST_ESTIMATES = 4
_ESTIMATE_S = 60.0
STOPPED = (130, 131)
FAILED = 3


@dataclass(frozen=True)
class Sweep:
    """A sweep whose folder is written and whose jobs can start."""

    folder: SweepFolder
    record: SweepRecord
    jobs: Sequence[ReadyJob]
    fail_fast: bool
    notes: tuple[str, ...] = ()


def new_sweep(
    typed: Sequence[str], cells: Sequence[Sequence[str]], configs: Sequence[RunConfig]
) -> Sweep:
    """Write the folder of a new sweep; ConfigError where that cannot be."""
    first = configs[0].sweep
    if any(config.sweep != first for config in configs):
        raise ConfigError("keys of `sweep` are about all jobs, so -m cannot vary them")
    for name in (config.checkpoint.resume for config in configs if config.checkpoint.resume):
        what = (
            "all jobs would go on in the folder of that run; model.run=RUN begins with its weights"
        )
        raise ConfigError(problem("checkpoint.resume", name, what))
    if len(cells) * first.repeats > MOST_JOBS:
        number = counted(len(cells) * first.repeats, "job")
        raise ConfigError(f"{number} are more than a sweep may have: {MOST_JOBS:,}")
    jobs = plan(cells, [config.seed for config in configs], first.repeats)
    if first.repeats > 1 and "seed" in plan(cells, [], 1)[0].differs:
        what = "seed has several values already; every repeat has a seed of its own"
        raise ConfigError(problem("sweep.repeats", first.repeats, what))
    of_jobs = [*configs] * first.repeats
    expected = _expected_s(of_jobs) if len(jobs) >= _MANY else None
    with nothing_started(), contextlib.ExitStack() as undo:
        name = configs[0].run_name or title(jobs)
        folder = SweepFolder(RunFolder.create(OUTPUTS / SWEEPS, name, now=datetime.now()).path)
        undo.callback(shutil.rmtree, folder.path, ignore_errors=True)
        folder.run.logs.rmdir()  # of ranks; a sweep has none
        record = SweepRecord(
            id=folder.path.name,
            version=version(),
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            overrides=list(typed),
            metric=first.metric,
            jobs=jobs,
        )
        ready = [written(folder, *job) for job in zip(jobs, of_jobs, strict=True)]
        folder.write(record)
        undo.pop_all()
    return Sweep(folder, record, ready, first.fail_fast, (_announcement(record, expected),))


def _announcement(record: SweepRecord, expected_s: float | None) -> str:
    text = f"sweep {record.id}: {counted(len(record.jobs), 'job')}"
    if expected_s is not None:
        return f"{text}; at least {duration(expected_s)} of training, by the dry run of some jobs"
    return f"{text}; how long they take is known after the first one"


def _expected_s(configs: Sequence[RunConfig]) -> float | None:
    """Seconds of training of all jobs, from the dry runs of some that are unlike each other. In a
    process of its own: torch would stay in the memory of this one. None where it is not known."""
    unlike: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups = (config.algorithm, config.cluster, config.model, config.data, config.training)
        unlike.setdefault(repr((groups, config.precision)), []).append(config)
    kinds = list(unlike.values())
    chosen = kinds[:: -(-len(kinds) // _MOST_ESTIMATES)]
    echo("estimating how long the jobs take")
    command = [sys.executable, "-P", "-m", "smolrun.cli", "--estimate"]
    order = msgspec.json.encode([resolved(kind[0]) for kind in chosen])
    try:
        done = subprocess.run(  # noqa: S603  (our own interpreter)
            command, input=order, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=_ESTIMATE_S, check=False,
        )  # fmt: skip
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
    except OSError:
        return None
    found = [msgspec.json.decode(line, type=float | None) for line in said.splitlines()]
    pairs = [(s, len(k)) for s, k in zip(found, chosen, strict=False) if s is not None]
    weight = sum(number for _, number in pairs)
    total = sum(seconds * number for seconds, number in pairs)
    return total / weight * len(configs) if weight else None


def written(folder: SweepFolder, job: SweepJob, config: RunConfig) -> ReadyJob:
    """The job's configuration, in its run folder and for its process. It is there from the
    beginning: what is edited while the sweep runs changes none of its jobs."""
    config = config.model_copy(update={"detach": False})
    if (seed := job.differs.get("seed")) is not None:
        config = config.model_copy(update={"seed": int(seed)})
    if config.tracker.kind == "wandb" and config.tracker.group is None:
        grouped = config.tracker.model_copy(update={"group": folder.path.name})
        config = config.model_copy(update={"tracker": grouped})
    run = folder.job(job.name)
    run.path.mkdir()
    run.write_config(_yaml(config))
    return _ready(run, config, job)


def _yaml(config: RunConfig) -> str:
    return msgspec.yaml.encode(redacted(config)).decode()


def _ready(
    run: RunFolder, config: RunConfig, job: SweepJob, *, starts_over: bool = False
) -> ReadyJob:
    # A run alone takes no keys of sweeps.
    typed = [word for word in job.overrides if not word.lstrip("+").startswith("sweep.")]
    order = {"config": resolved(config), "folder": str(run.path), "typed": typed}
    text = _yaml(config) if starts_over else None
    return ReadyJob(run.path.name, msgspec.json.encode(order), text)


def wanted_resume(overrides: Sequence[str]) -> bool:
    """Whether a stopped sweep is meant, and not a new one."""
    return any(
        key.lstrip("+") == "sweep.resume" and value not in ("null", "")
        for key, _, value in (line.partition("=") for line in overrides)
    )


def refuse_alone(overrides: Sequence[str]) -> None:
    """ConfigError for keys of a sweep without -m: one run would be silently less than was meant."""
    keys = [line.partition("=")[0].lstrip("+") for line in overrides]
    if wrong := [key for key in keys if key.startswith("sweep.") and key != "sweep.resume"]:
        raise ConfigError([f"{key}: a key of sweeps; write smolrun -m" for key in wrong])


def resumed_sweep(arguments: Arguments) -> tuple[Sweep, bool]:
    """What is left of a sweep, and whether to run it in the background. Its configurations come
    from its folder. ConfigError where there is no such sweep, or it cannot be resumed."""
    keys = [line.partition("=")[0].lstrip("+~") for line in arguments.overrides]
    if wrong := [key for key in keys if key not in MAY_CHANGE]:
        what = "a resumed sweep keeps its own settings"
        raise ConfigError([f"{key}: {what}; allowed: {', '.join(MAY_CHANGE)}" for key in wrong])
    data = compose.values(arguments)
    now = validate({**data, "sweep": {**data["sweep"], "resume": None}})
    wanted = str(data["sweep"]["resume"])
    try:
        folder = find_sweep(wanted)
        if folder is None:
            names = [one.path.name for one in sweep_folders()[:_MOST_NAMED]]
            what = f"no such sweep below {(OUTPUTS / SWEEPS).absolute()}"
            raise ConfigError(problem("sweep.resume", wanted, what, allowed=", ".join(names)))
        record = folder.record()
        folder.run.refuse_links_outside()
    except SmolrunError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(problem("sweep.resume", wanted, str(error))) from None
    if plugins := [line for line in record.overrides if line.startswith(compose.PLUGINS)]:
        what = f"not with {' '.join(plugins)}, which decided which jobs run"
        raise ConfigError(problem("sweep.resume", wanted, what))
    if folder.run.driver_lives():
        raise ConfigError(problem("sweep.resume", wanted, f"{folder.path.name} is still running"))
    views = [folder.look(job, is_alive=False) for job in record.jobs]
    left = [view for view in views if view.state != "done"]
    runs = {view.job.name: folder.job(view.job.name) for view in left}
    stored = {name: of_folder(run, data) for name, run in runs.items()}
    trusted = {run: stored[name] for name, run in runs.items()}
    require_trust("sweep.resume", folder.path, trusted, is_trusted=now.checkpoint.trust_run_folder)
    ready = [_left(runs[view.job.name], stored[view.job.name], view) for view in left]
    own = next(iter(stored.values()), {}).get("sweep", {})
    fail_fast = now.sweep.fail_fast if "sweep.fail_fast" in keys else own.get("fail_fast") is True
    return Sweep(folder, record, ready, fail_fast, _notes(record, views)), now.detach


def _left(run: RunFolder, stored: dict[str, Any], view: JobView) -> ReadyJob:
    """A stopped job resumes from its checkpoint, also where its last start has failed before it
    made a step; others start over."""
    checkpoint = None
    if view.state == "stopped" or made_no_step(run):
        checkpoint = newest_valid(run.checkpoints, lambda text: echo(f"warning: {text}"))
    if checkpoint is not None and read_manifest(checkpoint).step >= stored["training"]["steps"]:
        checkpoint = None  # stopped after its last step: it cannot go on
    own = {**stored["checkpoint"], "trust_run_folder": False}
    own["resume"] = None if checkpoint is None else str(run.path)
    config = validate({**stored, "checkpoint": own, "detach": False, "driver": None})
    return _ready(run, config, view.job, starts_over=view.state != "waiting" and checkpoint is None)


def _notes(record: SweepRecord, views: Sequence[JobView]) -> tuple[str, ...]:
    seconds = left_s(
        [
            dataclasses.replace(view, state="waiting") if view.state != "done" else view
            for view in views
        ]
    )
    left = f"; about {duration(seconds)} left" if seconds else ""
    notes = [f"resuming {record.id}: {counts_text(views)}{left}"]
    if failed := sum(view.state == "failed" for view in views):
        notes.append(f"{counted(failed, 'failed job')} will run again")
    if record.version != version():
        what = f"its first jobs ran on smolrun {record.version}, the rest runs on {version()}"
        notes.append(f"warning: {what}: figures of both may differ for that alone")
    return tuple(notes)


def run_sweep(sweep: Sweep) -> int:
    """Run the jobs of a sweep; returns its exit code. ConfigError if another process runs it."""
    folder, record, run = sweep.folder, sweep.record, sweep.folder.run
    with nothing_started():
        if not run.claim():
            raise ConfigError(
                f"{record.id} is still running: smolrun task=attach attach.run={record.id}"
            )
    began = time.monotonic()
    progress = SweepProgress(folder, record)
    console = SweepConsole(progress)
    try:
        with nothing_started():
            run.become_latest()
            begin_driving(run, steps=len(record.jobs), unit="jobs")
        for note in sweep.notes:
            echo(note)
        with keep_awake():
            runner = SweepRunner(folder, progress, console, fail_fast=sweep.fail_fast)
            code = runner.run(sweep.jobs)
        console.show(progress.look(is_alive=False), is_last=True)
    except OSError as error:
        code = FAILED
        console.close()
        echo(f"smolrun: the sweep ends, a job cannot be started: {error}", error=True)
    finally:
        console.close()
        run.release()
    compare(folder)
    end_sweep(folder, progress.look(is_alive=False), code, time.monotonic() - began)
    return code


def end_sweep(
    folder: SweepFolder,
    views: Sequence[JobView],
    code: int,
    wall_s: float,
    *,
    can_resume: bool = True,
) -> None:
    """summary.json of the sweep, and the last lines: what failed and why, and how to resume."""
    status = {0: "done", FAILED: "failed"}.get(code, "stopped")
    summary = {
        "status": status,
        "exit_code": code,
        "reason": counts_text(views),
        "steps": sum(view.state == "done" for view in views),
        "wall_s": round(wall_s, 3),
    }
    with contextlib.suppress(OSError):
        folder.run.write_summary(summary)
    echo(f"sweep folder: {folder.path}")
    for line in ending_lines(folder, views, can_resume=can_resume):
        echo(line, error=True)


def compare(folder: SweepFolder) -> None:
    """The comparison of what has ended, beside sweep.yaml."""
    from smolrun.comparison import compare_sweep  # not for the jobs' start

    compare_sweep(folder.path, say=echo)


def run_jobs(
    jobs: Sequence[Sequence[str]], flags: Sequence[str], start: Callable[[list[str]], int]
) -> int:
    """Run the jobs in turn and give back the worst exit code.

    A job that the user stopped ends the sweep.
    """
    worst = 0
    for number, overrides in enumerate(jobs, start=1):
        echo(f"smolrun: job {number} of {len(jobs)}: {' '.join(overrides)}", error=True)
        code = start([*flags, *overrides])
        worst = max(worst, code if code >= 0 else FAILED)
        if code in STOPPED:
            return code
    return worst


def start_job(arguments: list[str]) -> int:
    """One run in a new process; returns its exit code, or 130 when this process was asked to end.

    The terminal's Ctrl-C reaches the job too, which decides how to stop, so here it only means: go
    on waiting.
    """
    job: subprocess.Popen[bytes] | None = None
    is_ending = False

    def end(*_: object) -> None:
        nonlocal is_ending
        is_ending = True
        if job is not None:
            job.terminate()

    before = signal.signal(signal.SIGTERM, end)
    try:
        # -P: the folder we are in comes last on Python's path, as for the command `smolrun`.
        command = [sys.executable, "-P", "-m", "smolrun.cli", *arguments]
        job = subprocess.Popen(command)  # noqa: S603  (our own interpreter)
        if is_ending:
            job.terminate()
        code = _wait(job)
    finally:
        signal.signal(signal.SIGTERM, before)
    return STOPPED[0] if is_ending else code


def _wait(job: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return job.wait()
        except KeyboardInterrupt:
            continue
