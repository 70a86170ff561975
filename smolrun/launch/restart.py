"""Decides whether a run that lost a host is started again, when, and with which hosts.

    a rank or host is lost
      | all hosts answer ------------------------------------> start again, with all
      | some do not: wait for them, `wait_s` at most
      |      `min_hosts` or more answer by then -------------> start again, with these
      |      fewer ------------------------------------------> give up
      | started again `max` times already, or not lost at all: give up

Pure: who answers and what time it is are arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from smolrun.launch.supervisor_events import RunOutcome


@dataclass(frozen=True)
class Policy:
    """At most `max` more starts; `wait_s` for lost hosts; never on fewer than `min_hosts`."""

    max: int
    wait_s: float
    min_hosts: int


@dataclass(frozen=True)
class Relaunch:
    """Start again on these hosts, in the order of the cluster."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Ask again who answers: `missing` do not, and may until then."""

    missing: tuple[str, ...]
    until: float


@dataclass(frozen=True)
class GiveUp:
    """The run is over. `reason` is empty where there was nothing to be tried again."""

    reason: str = ""


def decide(
    policy: Policy,
    outcome: RunOutcome,
    hosts: Sequence[str],
    answered: Collection[str],
    *,
    starts: int,
    suspects: Collection[str] = (),
    lost_at: float,
    now: float,
) -> Relaunch | Wait | GiveUp:
    """What to do about an end of the run.

    `starts` counts how often it was started again before. `suspects` answer, but were lost before
    they had done anything: they are left out as long as there are enough others.
    """
    if outcome.status != "failed" or not outcome.is_lost:
        return GiveUp()
    if starts >= policy.max:
        times = "once" if starts == 1 else f"{starts} times"
        return GiveUp(f"it was started again {times} already (cluster.restart.max)")
    there = [host for host in hosts if host in answered]
    missing = tuple(host for host in hosts if host not in answered)
    until = lost_at + policy.wait_s
    if missing and now < until:
        return Wait(missing, until)
    trusted = [host for host in there if host not in suspects]
    chosen = trusted if len(trusted) >= max(1, policy.min_hosts) else there
    if not chosen or len(chosen) < policy.min_hosts:
        return GiveUp(_too_few(policy, missing, len(there)))
    return Relaunch(tuple(chosen))


def _too_few(policy: Policy, missing: Sequence[str], there: int) -> str:
    left = "no host is" if there == 0 else "one host is" if there == 1 else f"{there} hosts are"
    return (
        f"{', '.join(missing)} did not answer within {policy.wait_s:g} s, and {left} left "
        f"(cluster.restart.min_hosts={policy.min_hosts})"
    )
