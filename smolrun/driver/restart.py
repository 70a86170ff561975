"""cluster.restart: what the driver does between the loss of a host and the next start of its run.

    a rank or host is lost
      | all hosts answer ------------------------------------> restart on all hosts
      | some do not: wait for them, `wait_s` at most
      |      `min_hosts` or more answer by then -------------> restart on these
      |      fewer ------------------------------------------> give up
      | `max` restarts already, or no loss: give up

A restart resumes from the newest valid checkpoint. `decide` is pure: the hosts that answer and the
time are arguments.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from smolrun.checkpoints.find import CHECKPOINTS, newest_valid, read_manifest
from smolrun.config import RunConfig, redacted
from smolrun.config.cluster import RestartConfig
from smolrun.config.plan import THIS_MACHINE
from smolrun.driver.fleet import host_specs
from smolrun.driver.nearby import machine_of
from smolrun.driver.resume import ResumePoint, resume_point_of
from smolrun.driver.run_summary import not_equipped
from smolrun.driver.training_run import AttemptResult, TrainingRun
from smolrun.errors import HostError, HostErrors, SmolrunError
from smolrun.launch.driver import InterruptCounter
from smolrun.launch.supervisor_events import EXIT_STOPPED, RunOutcome
from smolrun.tracking.formatting import counted

_ASK_EVERY_S = 1.0
_POLL_S = 0.1
_QUICK_S = 1.0  # a probe that takes longer is reported
_ANSWER_S = 60.0  # beyond wait_s: a host has its own, shorter, limits to answer


@dataclass(frozen=True)
class Relaunch:
    """Start again on these hosts, in the order of the cluster."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Probe the hosts again: `missing` do not answer, and have until `until`."""

    missing: tuple[str, ...]
    until: float


@dataclass(frozen=True)
class GiveUp:
    """The run is over. `reason` is empty where the end was no loss."""

    reason: str = ""


def decide(
    policy: RestartConfig,
    outcome: RunOutcome,
    hosts: Sequence[str],
    answered: Collection[str],
    *,
    starts: int,
    suspects: Collection[str] = (),
    lost_at: float,
    now: float,
) -> Relaunch | Wait | GiveUp:
    """What to do after an attempt has ended.

    `starts` counts the restarts so far. `suspects` answer, but were lost before they had trained:
    they are left out as long as there are enough others.
    """
    if outcome.status != "failed" or not outcome.is_lost:
        return GiveUp()
    if starts >= policy.max:
        return GiveUp(f"it was restarted {counted(starts, 'time')} already (cluster.restart.max)")
    there = [host for host in hosts if host in answered]
    missing = tuple(host for host in hosts if host not in answered)
    until = lost_at + policy.wait_s
    if missing and now < until:
        return Wait(missing, until)
    trusted = [host for host in there if host not in suspects]
    chosen = trusted if len(trusted) >= policy.min_hosts else there
    if len(chosen) < policy.min_hosts:
        return GiveUp(
            f"{', '.join(missing)} did not answer within {policy.wait_s:g} s; left: "
            f"{', '.join(there) or 'no host'} "
            f"(cluster.restart.min_hosts={policy.min_hosts})"
        )
    return Relaunch(tuple(chosen))


@dataclass(frozen=True)
class NextStart:
    """The configuration of the next attempt, with the hosts that it uses, and where it resumes."""

    config: RunConfig
    resume: ResumePoint


class Restarts:
    """Trains until the run is over, and restarts it after a loss. `rows` (for summary.json) has one
    row per restart."""

    def __init__(
        self,
        config: RunConfig,
        say: Callable[[str], None],
        reachable: Callable[[], Sequence[str]],
    ) -> None:
        """`reachable` returns the names of the hosts that answer; it may block, and is called in a
        thread of its own."""
        self.rows: list[dict[str, Any]] = []
        self._config = config
        self._say = say
        self._reachable = reachable
        self._has_begun = False
        self._suspects: set[str] = set()

    def train(
        self, run: TrainingRun, make: Callable[[NextStart], TrainingRun]
    ) -> tuple[TrainingRun, RunOutcome]:
        """Train `run`, and after a loss what `make` returns; the last attempt, and its outcome."""
        ended = run.train()
        while isinstance(found := self.after(ended), NextStart):
            try:
                run = make(found)
                # checkpoint.resume is to use all hosts, also those that are away now.
                plain = msgspec.yaml.encode(redacted(self._config)).decode()
                found.resume.folder.write_config(plain)
            except (HostError, HostErrors) as error:  # it answered a moment ago
                ended = dataclasses.replace(
                    ended,
                    outcome=not_equipped(error),
                    done=max(ended.done, ended.outcome.steps),
                    has_begun=False,
                )
            except (SmolrunError, OSError) as error:
                reason = f"{ended.outcome.reason}; it could not be restarted: {error}"
                return run, dataclasses.replace(ended.outcome, reason=reason)
            except KeyboardInterrupt:
                return run, _stopped(ended.outcome)
            else:
                ended = run.train()
        if self.rows:
            times = counted(len(self.rows), "time")
            lost_steps = sum(row["lost_steps"] for row in self.rows)
            self._say(f"the run was restarted {times}; {counted(lost_steps, 'step')} repeated")
        return run, found

    def after(self, ended: AttemptResult) -> NextStart | RunOutcome:
        """The next attempt; or the outcome of the run, if it is over."""
        restart, outcome = self._config.cluster.restart, ended.outcome
        if ended.has_begun:
            self._has_begun = True
            self._suspects.clear()
        elif self._has_begun and outcome.failed_host is not None:
            self._suspects.add(outcome.failed_host)
        if restart is None or not outcome.is_lost or not self._has_begun:
            return outcome
        interrupts = InterruptCounter()
        with interrupts.installed():
            move = self._decided(
                restart, ended, lambda: bool(interrupts.count or ended.folder.stop_requests())
            )
            if isinstance(move, GiveUp):
                reason = "; ".join(filter(None, (outcome.reason, move.reason)))
                return dataclasses.replace(outcome, reason=reason)
            start = self._next_start(restart, ended, move) if move is not None else None
            if start is None or interrupts.count:
                return _stopped(outcome)
            return start

    def _decided(
        self, policy: RestartConfig, ended: AttemptResult, is_stopped: Callable[[], bool]
    ) -> Relaunch | GiveUp | None:
        """The decision, after waiting for hosts; None if the user has stopped the run."""
        lost_at = time.monotonic()
        is_reported = False
        while True:
            answered = self._answers(ended, lost_at + policy.wait_s + _ANSWER_S, is_stopped)
            if answered is None:
                return None
            move = decide(
                policy,
                ended.outcome,
                _hosts(self._config),
                answered,
                starts=len(self.rows),
                suspects=self._suspects,
                lost_at=lost_at,
                now=time.monotonic(),
            )
            if not isinstance(move, Wait):
                return move
            if not is_reported:
                is_reported = True
                names = " and ".join(move.missing)
                self._say(f"{ended.outcome.reason}; waiting {policy.wait_s:g} s for {names}")
            ask_at = min(time.monotonic() + _ASK_EVERY_S, move.until)
            while time.monotonic() < ask_at:
                if is_stopped():
                    return None
                time.sleep(_POLL_S)

    def _answers(
        self, ended: AttemptResult, deadline: float, is_stopped: Callable[[], bool]
    ) -> Sequence[str] | None:
        """The hosts that answer; empty at the deadline. None if the user has stopped the run."""
        answered: list[str] = []

        def ask() -> None:
            with suppress(Exception):  # a host that fails in whatever way does not answer
                answered.extend(self._reachable())

        asking = threading.Thread(target=ask, name="smolrun-who-answers", daemon=True)
        asking.start()
        asking.join(_QUICK_S)
        if asking.is_alive():  # a host that is off is only known by its timeout
            self._say(f"{ended.outcome.reason}; probing the hosts")
        while asking.is_alive() and time.monotonic() < deadline:
            if is_stopped():
                return None
            asking.join(_POLL_S)
        return list(answered)

    def _next_start(self, policy: RestartConfig, ended: AttemptResult, move: Relaunch) -> NextStart:
        """From the newest valid checkpoint, or from step 0; reports it in one line."""
        folder, outcome = ended.folder, ended.outcome
        checkpoint = newest_valid(
            folder.path / CHECKPOINTS, lambda text: self._say(f"warning: {text}")
        )
        resume = (
            ResumePoint(folder, None, 0, 0.0, None, None, None, {})
            if checkpoint is None
            else resume_point_of(folder, checkpoint, read_manifest(checkpoint))
        )
        step = max(outcome.steps, ended.done)
        lost_steps = max(0, step - resume.updates)
        self.rows.append(
            {
                "step": step,
                "lost_host": outcome.failed_host,
                "lost_rank": outcome.failed_rank,
                "reason": outcome.reason,
                "resumed_from": resume.updates,
                "lost_steps": lost_steps,
                "hosts": list(move.hosts),
            }
        )
        for line in outcome.log_tail:
            self._say(f"  | {line}")
        source = "the beginning" if checkpoint is None else checkpoint.name
        without = [host for host in _hosts(self._config) if host not in move.hosts]
        hosts = ", ".join(move.hosts) + (f" (without {', '.join(without)})" if without else "")
        self._say(
            f"{outcome.reason}; restart {len(self.rows)} of {policy.max} after step {step}, from "
            f"{source}: {counted(lost_steps, 'step')} lost, on {hosts}"
        )
        return NextStart(_only(self._config, move.hosts), resume)


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


def _has_joined(host: str) -> bool:
    try:
        return not machine_of(host).connection.is_silent
    except HostError:
        return False


def reachable_hosts(config: RunConfig) -> list[str]:
    """The names of the hosts that answer, in the order of the cluster; this machine is one of them.

    Opens a new SSH connection to every other host, all in parallel, within
    `cluster.connect_timeout_s` each.
    """
    hosts = config.cluster.hosts
    if hosts is None:
        return [THIS_MACHINE]
    specs = {spec.name: spec for spec in host_specs(config)}
    answers = {host.name: host.is_here or _has_joined(host.name) for host in hosts}
    if specs:
        from smolrun.launch.remote.machine import HostSpec
        from smolrun.launch.run_on_all import run_on_all
        from smolrun.launch.ssh.connect import open_machine

        def ask(spec: HostSpec) -> bool:
            try:
                machine = open_machine(spec)
            except Exception:  # one that fails in a way of its own must not speak for the others
                return False
            machine.close()
            return True

        answers |= run_on_all(specs, ask, "ask")
    return [host.name for host in hosts if answers.get(host.name)]
