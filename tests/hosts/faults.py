"""What a fault does to a run that lives: how long until it ends, its sentence, and what is left."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from smolrun.checkpoints.find import CHECKPOINTS, checkpoints_in, newest_valid
from tests.hosts.host import Host
from tests.hosts.runs import SMALL, Driver, finish, workers
from tests.waiting import SOON_S, until

LONG = [*SMALL, "training.steps=100000"]
FAST = [*LONG, "mesh.liveness=fast"]
# Goal R2: a peer that falls silent is found out after so many seconds at most.
NORMAL_S, FAST_S = 10.0, 4.0
# From the verdict to the end of the command: who lives is ended, hosts are tidied up, and the
# summary is written, all of it by three Pythons on cores that others use too.
TIDY_S = 8.0

_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) WARNING \S+: lost rank")


@dataclass(frozen=True)
class End:
    """How a run ended; `seconds` after the fault, which others had `seen_s` after it."""

    code: int
    out: str
    err: str
    seconds: float
    seen_s: float

    @property
    def sentence(self) -> str:
        """Why, in one line."""
        lines = [line for line in self.err.splitlines() if line.startswith("smolrun: rank")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("smolrun: ")


def end_after(
    driver: Driver,
    harm: Callable[[], object],
    overrides: Sequence[str] = FAST,
    *,
    step: int = 7,
    timeout_s: float = 60.0,
) -> End:
    """Start a run, do it harm when `step` steps are done and one was saved; hear how it ends."""
    run = driver.start(*overrides)
    driver.wait_for_step(step)
    until(lambda: bool(checkpoints_in(driver.latest / CHECKPOINTS)))  # a whole one, not a part
    clock, began = time.time(), time.monotonic()
    harm()
    code, out, err = finish(run, timeout_s)
    seconds = time.monotonic() - began
    seen = [at for path in (driver.latest / "logs").iterdir() for at in _losses(path)]
    return End(code, out, err, seconds, min(seen, default=clock) - clock)


def _losses(log: Path) -> list[float]:
    """When a rank noticed that it had lost another."""
    lines = map(_LOG_LINE.match, log.read_text().splitlines())
    return [
        datetime.strptime(line[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() for line in lines if line
    ]


def assert_blamed(driver: Driver, end: End, host: Host) -> None:
    """Exit code 3, and the sentence and the summary name the host and its rank."""
    assert end.code == 3, end.out + end.err
    rank = host.number - 1
    assert end.sentence.startswith(f"rank {rank} on {host.name} "), end.sentence
    summary = driver.summary
    assert summary["status"] == "failed"
    assert (summary["failed_rank"], summary["failed_host"]) == (rank, host.name)
    assert summary["reason"] == end.sentence


def assert_gone(hosts: Sequence[Host], timeout_s: float = SOON_S) -> None:
    """No worker is left on these hosts."""
    until(lambda: not any(workers(host) for host in hosts), timeout_s)


def folders(hosts: Sequence[Host]) -> list[str]:
    """Hosts on which something of a run is left."""
    return [host.name for host in hosts if list(host.workdir.glob("runs/*"))]


def assert_checkpoint_is_whole(driver: Driver) -> None:
    """The newest one is what the summary says, and every byte is as it was saved."""
    complaints: list[str] = []
    newest = newest_valid(driver.latest / CHECKPOINTS, complaints.append)
    assert complaints == []
    assert newest is not None and newest.name == driver.summary["checkpoint"]
