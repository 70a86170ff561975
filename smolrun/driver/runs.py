"""Which run is meant by `run=`, and how to look at it: here, or on the machine that drives it."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import msgspec

from smolrun.config import RunConfig, validate, world_size
from smolrun.config.suggest import problem
from smolrun.errors import CheckpointError, ConfigError, HostError
from smolrun.files import read_yaml
from smolrun.log_records import LogRecord
from smolrun.sanitize import echo
from smolrun.tracking import past_runs
from smolrun.tracking.logs import LogQuery, read_logs
from smolrun.tracking.past_runs import PastRun
from smolrun.tracking.run_folder import LATEST, OUTPUTS, RunFolder
from smolrun.tracking.run_view import Request, View, answer

_HERE_EVERY_S, _THERE_EVERY_S = 0.5, 2.0
OUT_OF_REACH_S = 60.0  # so long the machine that drives a run may not answer


@dataclass(frozen=True)
class OpenRun:
    """A run that can be looked at. `ask` gets a request without its folder; HostError where the
    machine that drives the run does not answer, OSError where the run cannot be asked to stop."""

    folder: RunFolder  # on this machine
    ask: Callable[[Request], View]
    every_s: float  # how often it makes sense to look
    driver_host: str | None = None  # null: this machine

    def ask_again(self, request: Request, say: Callable[[str], None]) -> View:
        """As `ask`, but a machine that does not answer is asked for a minute, which `say` reports
        once. HostError after that."""
        give_up = time.monotonic() + OUT_OF_REACH_S
        is_reported = False
        while True:
            try:
                return self.ask(request)
            except HostError as error:
                if time.monotonic() > give_up:
                    raise
                if not is_reported:
                    say(f"{error}; trying again for {OUT_OF_REACH_S:.0f} s")
                    is_reported = True
                time.sleep(self.every_s)


def find_run(key: str, wanted: str) -> RunFolder:
    """The run that `wanted`, the value of `key`, means; ConfigError with those that exist. Latest
    is a server that is alive, or the newest training run, also one that has not begun to train; the
    user is asked where several are alive and one of them is a server."""
    try:
        found = _latest() if wanted == LATEST else [past_runs.find_run(OUTPUTS, wanted)]
    except CheckpointError as error:
        raise ConfigError(problem(key, wanted, str(error))) from None
    return found[0] if len(found) == 1 else _chosen(key, found)


def _latest() -> list[RunFolder]:
    """The servers that may be alive, and the newest training run unless it is over beside them."""
    servers, training = past_runs.living_servers(OUTPUTS), past_runs.starting(OUTPUTS)
    if training is not None:
        return [*servers, training]
    try:
        latest = past_runs.find_run(OUTPUTS, LATEST)
    except CheckpointError:
        ended = filter(past_runs.is_server, past_runs.run_folders(OUTPUTS))
        if found := servers or list(itertools.islice(ended, 1)):
            return found
        raise
    return [*servers, latest] if not servers or past_runs.may_live(latest) else servers


def _chosen(key: str, folders: Sequence[RunFolder]) -> RunFolder:
    """The one of several living runs that the user names at a terminal; ConfigError elsewhere."""
    runs = [run for run in with_remote(map(past_runs.look, folders)) if run.may_be_running]
    if len(runs) < 2:
        return runs[0].folder if runs else folders[0]
    lines = [f"{run.folder.run_id}  {run.doing}" for run in runs]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        names = "".join(f"\n  {line}" for line in lines)
        raise ConfigError(f"{key} = {LATEST}: {len(runs)} runs are alive, so name one:{names}")
    for number, line in enumerate(lines, start=1):
        echo(f"{number}  {line}")
    while True:
        answer = input(f"which one? [1-{len(runs)}] ").strip()
        if answer.isdigit() and 1 <= int(answer) <= len(runs):
            return runs[int(answer) - 1].folder


def with_remote(found: Iterable[PastRun]) -> list[PastRun]:
    """The same runs, those of other machines as these say that they are; all are asked at once."""
    runs = list(found)
    remote = {run.folder.run_id: run for run in runs if run.state == "remote"}
    if not remote:
        return runs
    from smolrun.launch.run_on_all import run_on_all

    asked = run_on_all(remote, _ask_there, "status")
    return [asked.get(run.folder.run_id, run) for run in runs]


def _ask_there(run: PastRun) -> PastRun:
    try:
        with opened(run.folder) as there:
            view = there.ask(Request("", figures=True))
    except HostError:
        return dataclasses.replace(run, state="unreachable")
    return dataclasses.replace(run, state=view.state, url=url_of(there, view), **view.figures)


def url_of(run: OpenRun, view: View) -> str | None:
    """Where a server answers, with the host that a local address is of; None if it does not."""
    url = view.summary.get("url")
    if view.state != "serving" or not isinstance(url, str):
        return None
    return url if run.driver_host is None else f"{url} on {run.driver_host}"


@contextmanager
def opened(folder: RunFolder) -> Iterator[OpenRun]:
    """The run, to look at; HostError where another machine drives it and does not answer."""
    if _is_here(folder):
        yield OpenRun(folder, lambda request: _ask_here(folder, request), _HERE_EVERY_S)
        return
    from smolrun.driver.remote_driver import remote_run  # loads the SSH library

    with closing(remote_run(folder)) as remote:
        yield OpenRun(folder, remote.ask, _THERE_EVERY_S, remote.host)


def logs_of(folder: RunFolder, query: LogQuery) -> Iterator[LogRecord | None]:
    """The records of a run as `read_logs` gives them, wherever its files are; HostError where
    another machine drives it and does not answer."""
    if _is_here(folder):
        yield from read_logs(folder, query)
        return
    from smolrun.driver.remote_driver import remote_run  # loads the SSH library

    with closing(remote_run(folder)) as remote:
        yield from remote.logs(query)


def _is_here(folder: RunFolder) -> bool:
    """Whether its files are on this machine: the run was driven here, or they were fetched."""
    return bool(not folder.is_driven_elsewhere or folder.driver() or folder.summary())


def _ask_here(folder: RunFolder, request: Request) -> View:
    return answer(msgspec.structs.replace(request, folder=str(folder.path)))


def config_of(folder: RunFolder) -> RunConfig | None:
    """The run's configuration; None if it is of a version that had other keys."""
    try:
        return validate(msgspec.yaml.decode(read_yaml(folder.config)))
    except (ConfigError, ValueError, OSError, RecursionError):
        return None


def ranks_of(config: RunConfig | None) -> int:
    """How many ranks a run has, as far as that is known."""
    return 1 if config is None else world_size(config)
