"""`smolrun -m`: the jobs of a sweep, each in a process of its own, one after another."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from smolrun.sanitize import echo

STOPPED = (130, 131)
FAILED = 3


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
