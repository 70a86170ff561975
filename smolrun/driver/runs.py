"""Which run is meant by `run=`, and how to look at it: here, or on the machine that drives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import msgspec

from smolrun.config import RunConfig, validate, world_size
from smolrun.config.suggest import problem
from smolrun.errors import CheckpointError, ConfigError, HostError
from smolrun.files import read_yaml
from smolrun.tracking import past_runs
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
    is a run that has not begun to train yet, if there is one."""
    try:
        if wanted == LATEST and (run := past_runs.starting(OUTPUTS)) is not None:
            return run
        return past_runs.find_run(OUTPUTS, wanted)
    except CheckpointError as error:
        raise ConfigError(problem(key, wanted, str(error))) from None


@contextmanager
def opened(folder: RunFolder) -> Iterator[OpenRun]:
    """The run, to look at; HostError where another machine drives it and does not answer."""
    if not folder.is_driven_elsewhere or folder.driver() or folder.summary():
        yield OpenRun(folder, lambda request: _ask_here(folder, request), _HERE_EVERY_S)
        return
    from smolrun.driver.remote_driver import remote_run  # loads the SSH library

    with closing(remote_run(folder)) as remote:
        yield OpenRun(folder, remote.ask, _THERE_EVERY_S, remote.host)


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
