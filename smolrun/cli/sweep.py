"""`smolrun -m`: the jobs of a sweep, each in a process of its own, one after another."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

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
        print(
            f"smolrun: job {number} of {len(jobs)}: {' '.join(overrides)}",
            file=sys.stderr,
            flush=True,
        )
        code = start([*flags, *overrides])
        worst = max(worst, code if code >= 0 else FAILED)
        if code in STOPPED:
            return code
    return worst


def start_job(arguments: list[str]) -> int:
    """One run in a new process; returns its exit code.

    The terminal's Ctrl-C reaches the job too, which decides how to stop, so here it only means: go
    on waiting.
    """
    # -P: the folder we are in comes last on Python's path, as it does for the command `smolrun`.
    job = subprocess.Popen([sys.executable, "-P", "-m", "smolrun.cli", *arguments])  # noqa: S603
    before = signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    try:
        while True:
            try:
                return job.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
