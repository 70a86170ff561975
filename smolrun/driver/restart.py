"""cluster.restart: what the driver does between the loss of a host and the next start of its run.

It asks who still answers, waits for who does not, finds the newest good checkpoint, and says what
is lost. When to go on and with whom is decided in launch/restart.py; nothing here starts a rank.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from smolrun.checkpoints.find import CHECKPOINTS, newest_valid, read_manifest
from smolrun.config import RunConfig, redacted
from smolrun.config.plan import THIS_MACHINE
from smolrun.driver.fleet import host_specs
from smolrun.driver.resume import Earlier, earlier_of
from smolrun.driver.run_summary import not_equipped
from smolrun.errors import HostError, HostErrors, SmolrunError
from smolrun.launch.driver import InterruptCounter
from smolrun.launch.restart import GiveUp, Policy, Relaunch, Wait, decide
from smolrun.launch.supervisor_events import EXIT_STOPPED, RunOutcome
from smolrun.tracking.run_folder import RunFolder

_ASK_EVERY_S = 1.0
_POLL_S = 0.1
_QUICK_S = 1.0  # what takes longer is told
_ANSWER_S = 60.0  # beyond the time to wait: a host has its own, shorter, limits to answer


@dataclass(frozen=True)
class NextStart:
    """How the run begins again: on which hosts, and from where."""

    config: RunConfig
    earlier: Earlier


@dataclass
class Lost:
    """How a start of the run ended. `done` are the steps that it began with, or more;
    `has_begun` says whether it trained at all."""

    outcome: RunOutcome
    folder: RunFolder
    done: int
    has_begun: bool


class Run(Protocol):
    """One start of the run, ready to train; none of its ranks is left when `train` returns."""

    def train(self) -> RunOutcome:
        """From the start of the ranks to their end."""

    def lost(self, outcome: RunOutcome) -> Lost:
        """What is to be known of this start when it is over."""


_AnyRun = TypeVar("_AnyRun", bound=Run)


def train_on(
    run: _AnyRun, restarts: Restarts, make: Callable[[NextStart], _AnyRun]
) -> tuple[_AnyRun, RunOutcome]:
    """Train, and begin again as often as the configuration wants; the last start, and its end."""
    lost = run.lost(run.train())
    while True:
        found = restarts.after(lost)
        if isinstance(found, RunOutcome):
            restarts.tell_at_the_end()
            return run, found
        try:
            run = make(found)
            restarts.keep_config(found.earlier.folder)
        except (HostError, HostErrors) as error:  # it answered a moment ago
            done = max(lost.done, lost.outcome.steps)
            lost = dataclasses.replace(
                lost, outcome=not_equipped(error), done=done, has_begun=False
            )
        except (SmolrunError, OSError) as error:
            reason = f"{lost.outcome.reason}; it could not be started again: {error}"
            return run, dataclasses.replace(lost.outcome, reason=reason)
        except KeyboardInterrupt:
            return run, _stopped(lost.outcome)
        else:
            lost = run.lost(run.train())


class Restarts:
    """All that is to be known about the starts of one run, by one driver."""

    def __init__(
        self,
        config: RunConfig,
        say: Callable[[str], None],
        who_answers: Callable[[], Sequence[str]],
    ) -> None:
        """`who_answers` gives the names of the hosts that do; it may take its time, and is called
        from a thread of its own."""
        self.rows: list[dict[str, Any]] = []  # for summary.json, one for each new start
        self._config = config
        self._say = say
        self._who_answers = who_answers
        self._has_begun = False
        self._suspects: set[str] = set()

    def after(self, lost: Lost) -> NextStart | RunOutcome:
        """How to begin again; or how the run ended, if that was its end."""
        restart = self._config.cluster.restart
        self._note(lost)
        if restart is None or not lost.outcome.is_lost or not self._has_begun:
            return lost.outcome
        policy = Policy(restart.max, restart.wait_s, restart.min_hosts)
        interrupts = InterruptCounter()
        with interrupts.installed():
            move = self._decided(policy, lost, lambda: bool(interrupts.count) or _is_asked(lost))
            if isinstance(move, GiveUp):
                reason = "; ".join(filter(None, (lost.outcome.reason, move.reason)))
                return dataclasses.replace(lost.outcome, reason=reason)
            start = self._next_start(policy, lost, move) if isinstance(move, Relaunch) else None
            if start is None or interrupts.count:
                return _stopped(lost.outcome)
            return start

    def tell_at_the_end(self) -> None:
        """What the losses have cost, for those who look only now."""
        if self.rows:
            times = "once" if len(self.rows) == 1 else f"{len(self.rows)} times"
            lost_steps = sum(row["lost_steps"] for row in self.rows)
            self._say(f"the run was started again {times}; {lost_steps} steps were made twice")

    def keep_config(self, folder: RunFolder) -> None:
        """The configuration that a user goes on with names all hosts, also those that are away."""
        folder.write_config(msgspec.yaml.encode(redacted(self._config)).decode())

    def _note(self, lost: Lost) -> None:
        """A host that was lost before it did anything is not the first one to be asked again."""
        if lost.has_begun:
            self._has_begun = True
            self._suspects.clear()
        elif self._has_begun and lost.outcome.failed_host is not None:
            self._suspects.add(lost.outcome.failed_host)

    def _decided(
        self, policy: Policy, lost: Lost, is_stopped: Callable[[], bool]
    ) -> Relaunch | GiveUp | None:
        """The decision, once it has been waited for; None if the user has stopped the run."""
        lost_at = time.monotonic()
        is_told = False
        while True:
            answered = self._answers(lost, lost_at + policy.wait_s + _ANSWER_S, is_stopped)
            if answered is None:
                return None
            move = decide(
                policy,
                lost.outcome,
                _hosts(self._config),
                answered,
                starts=len(self.rows),
                suspects=self._suspects,
                lost_at=lost_at,
                now=time.monotonic(),
            )
            if not isinstance(move, Wait):
                return move
            if not is_told:
                is_told = True
                names = " and ".join(move.missing)
                limit = f"{names} has {policy.wait_s:g} s to come back"
                self._say(f"{lost.outcome.reason}; {limit}")
            ask_at = min(time.monotonic() + _ASK_EVERY_S, move.until)
            while time.monotonic() < ask_at:
                if is_stopped():
                    return None
                time.sleep(_POLL_S)

    def _answers(
        self, lost: Lost, deadline: float, is_stopped: Callable[[], bool]
    ) -> Sequence[str] | None:
        """Who answers; nobody if that cannot be said in time. None if the user stopped the run."""
        answered: list[str] = []

        def ask() -> None:
            with suppress(Exception):  # a host that fails in whatever way does not answer
                answered.extend(self._who_answers())

        asking = threading.Thread(target=ask, name="smolrun-who-answers", daemon=True)
        asking.start()
        asking.join(_QUICK_S)
        if asking.is_alive():  # a host that is off answers only by its silence
            self._say(f"{lost.outcome.reason}; asking the hosts who answers")
        while asking.is_alive() and time.monotonic() < deadline:
            if is_stopped():
                return None
            asking.join(_POLL_S)
        return list(answered)

    def _next_start(self, policy: Policy, lost: Lost, move: Relaunch) -> NextStart:
        """From the newest checkpoint that is whole, or from the beginning."""
        folder, outcome = lost.folder, lost.outcome
        checkpoint = newest_valid(
            folder.path / CHECKPOINTS, lambda text: self._say(f"warning: {text}")
        )
        earlier = (
            Earlier(folder, None, 0, 0.0, None, None, None, {})
            if checkpoint is None
            else earlier_of(folder, checkpoint, read_manifest(checkpoint))
        )
        step = max(outcome.steps, lost.done)
        self.rows.append(
            {
                "step": step,
                "lost_host": outcome.failed_host,
                "lost_rank": outcome.failed_rank,
                "reason": outcome.reason,
                "resumed_from": earlier.updates,
                "lost_steps": max(0, step - earlier.updates),
                "hosts": list(move.hosts),
            }
        )
        self._tell(policy, lost, earlier, move)
        return NextStart(_only(self._config, move.hosts), earlier)

    def _tell(self, policy: Policy, lost: Lost, earlier: Earlier, move: Relaunch) -> None:
        """The whole story in one line, and what the lost rank said last."""
        row, outcome = self.rows[-1], lost.outcome
        source = "the beginning" if earlier.checkpoint is None else earlier.checkpoint.name
        steps = f"{row['lost_steps']} step{'' if row['lost_steps'] == 1 else 's'}"
        without = [host for host in _hosts(self._config) if host not in move.hosts]
        hosts = ", ".join(move.hosts) + (f" (without {', '.join(without)})" if without else "")
        for line in outcome.log_tail:
            self._say(f"  | {line}")
        self._say(
            f"{outcome.reason}; restart {len(self.rows)} of {policy.max}: after step {row['step']} "
            f"it goes on from {source}, {steps} of work lost, on {hosts}"
        )


def _is_asked(lost: Lost) -> bool:
    return lost.folder.stop_requests() > 0


def _stopped(outcome: RunOutcome) -> RunOutcome:
    return dataclasses.replace(
        outcome,
        status="stopped",
        exit_code=EXIT_STOPPED,
        reason=f"stopped by the user after a loss: {outcome.reason}",
        is_lost=False,
    )


def _hosts(config: RunConfig) -> list[str]:
    return [host.name for host in config.cluster.hosts or ()] or [THIS_MACHINE]


def _only(config: RunConfig, hosts: Sequence[str]) -> RunConfig:
    """The configuration for a start on these hosts alone."""
    if config.cluster.hosts is None:
        return config
    kept = [host for host in config.cluster.hosts if host.name in hosts]
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"hosts": kept})})


def reachable_hosts(config: RunConfig) -> list[str]:
    """Their names, in the order of the cluster; this machine always does.

    Every other one is logged in to anew, all at once, within `cluster.connect_timeout_s` each.
    """
    hosts = config.cluster.hosts
    if hosts is None:
        return [THIS_MACHINE]
    specs = {spec.name: spec for spec in host_specs(config)}
    answers = {host.name: True for host in hosts if host.name not in specs}
    if specs:
        from smolrun.launch.remote.probe import HostSpec
        from smolrun.launch.run_on_all import run_on_all
        from smolrun.launch.ssh.connect import open_machine

        def ask(spec: HostSpec) -> bool:
            try:
                machine = open_machine(
                    spec,
                    ssh_config=config.cluster.ssh_config,
                    timeout_s=config.cluster.connect_timeout_s,
                    cluster=config.cluster.name,
                )
            except Exception:  # one that fails in a way of its own must not speak for the others
                return False
            machine.close()
            return True

        answers |= run_on_all(specs, ask, "ask")
    return [host.name for host in hosts if answers.get(host.name)]
