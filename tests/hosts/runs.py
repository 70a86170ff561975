"""Runs on the hosts of a lab, started as a user starts them, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.hosts.host import Host
from tests.hosts.lab import Lab
from tests.waiting import SOON_S, until

# A model that learns in seconds, from data that needs no network.
SMALL = ["model=mlp", "data=digits", "checkpoint.every=5", "training.steps=20"]


class Driver:
    """`smolrun` in a folder of its own, with the hosts of a lab as cluster=lab."""

    def __init__(self, lab: Lab, folder: Path, **cluster: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.lab = lab
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []
        lab.write_cluster(folder / "conf", "lab", **cluster)

    def start(self, *overrides: str, cluster: str = "lab") -> subprocess.Popen[str]:
        """The command, with its output in pipes."""
        run = subprocess.Popen(
            [sys.executable, "-m", "smolrun.cli", f"cluster={cluster}", *overrides],
            cwd=self.folder,
            env={**os.environ, "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(run)
        return run

    def end(self) -> None:
        """Ends what a failed test left running, and waits until all hosts are clean."""
        for run in self._started:
            if run.poll() is None:
                run.kill()
                run.communicate()
        until(lambda: not any(workers(host) for host in self.lab.hosts), 20.0)
        for host in self.lab.hosts:  # a driver that was killed could not clean up
            for folder in host.workdir.glob("runs/*"):
                host.run("rm", "-r", str(folder))

    def run(
        self, *overrides: str, cluster: str = "lab", timeout_s: float = 90.0
    ) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of the command."""
        return finish(self.start(*overrides, cluster=cluster), timeout_s)

    @property
    def latest(self) -> Path:
        """The folder of the newest run; outputs/latest is that only once it has begun to train."""
        outputs = self.folder / "outputs"
        runs = [path for path in outputs.glob("*-*") if not path.is_symlink()]
        return max(runs, default=outputs / "latest")

    @property
    def summary(self) -> dict[str, Any]:
        """How it ended."""
        loaded: dict[str, Any] = json.loads((self.latest / "summary.json").read_text())
        return loaded

    def rows(self, event: str) -> list[dict[str, Any]]:
        """What its metrics say of one kind of event."""
        written = (self.latest / "metrics.jsonl").read_text()
        lines = written[: written.rfind("\n") + 1].splitlines()  # the last may be half written yet
        return [row for row in map(json.loads, lines) if row["event"] == event]

    def wait_for_step(self, step: int, timeout_s: float = 60.0) -> None:
        """Until so many steps are done."""

        def is_there() -> bool:
            try:
                return len(self.rows("step")) >= step
            except OSError:
                return False

        until(is_there, timeout_s)


def finish(run: subprocess.Popen[str], timeout_s: float = 90.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr once it has ended, which must be in time."""
    try:
        out, err = run.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        run.kill()
        out, err = run.communicate()
        raise AssertionError(f"no end within {timeout_s} s:\n{out}\n{err}") from None
    return run.returncode, out, err


def workers(host: Host) -> list[int]:
    """Process ids of the workers on a host."""
    return [one.pid for one in host.processes() if "--worker" in one.command]


def assert_clean(hosts: Sequence[Host], said: str = "") -> None:
    """No worker, and nothing of a run, is left on any host; waits, as what ended may take a while
    to be gone. `said`: by the driver, for the failure."""
    try:
        until(lambda: not any(map(left_on, hosts)), SOON_S)
    except AssertionError:
        found = {host.name: left_on(host) for host in hosts}
        raise AssertionError(f"after {SOON_S} s there is still: {found}\n{said}") from None


def left_on(host: Host) -> list[str]:
    """The workers of a host, and the files of its runs."""
    files = [str(path.relative_to(host.workdir)) for path in host.workdir.glob("runs/**/*")]
    processes = [" ".join(one.command) for one in host.processes() if "--worker" in one.command]
    return [*files, *processes]
