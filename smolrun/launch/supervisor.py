"""Decides what the driver does with its workers: start together, end together, always an end.

A pure state machine: what happened goes in, what to do comes out, and time is an argument. It knows
nothing of processes, threads, signals or the clock, so tests push any order of events through it
(`driver.py` wires it to real workers).

    STARTING -- all ready: roster --> RUNNING -- first Ctrl-C: stop --> STOPPING
       |                                |  |                              |
       |              a rank failed: grace  | all reported      too slow, or second Ctrl-C
       |                                v  |                              |
       |                            FAILING |                             |
       v                                v   v                             v
       +------------------------------> CLOSING (kill what is left) ---> FINISHED
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from smolrun.events import Note, RankStep, StepDone
from smolrun.launch.control import LEASE_EVERY_S, RosterPeer
from smolrun.launch.root_cause import (
    RankState,
    RootCause,
    did_not_finish,
    is_explained,
    names,
    not_ready,
    pick_cause,
)
from smolrun.launch.supervisor_events import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_STOPPED_NOW,
    Action,
    DriverFailed,
    Exited,
    Finish,
    HostSilent,
    Input,
    Interrupted,
    Kill,
    NotStarted,
    ProtocolViolation,
    RankInput,
    Reported,
    RunOutcome,
    SendRoster,
    SendStop,
    WorkerFinished,
    WorkerReady,
)


@dataclass(frozen=True)
class Limits:
    """How long each wait may last, in seconds.

    `finish_s`: from the first rank's result to the last one's. `stop_s`: from Ctrl-C to the last
    result (a step, and saving). `grace_s`: from the first sign of failure to its explanation by the
    others; `settle_s` is enough once all others have named the silent rank. `exit_s`: from a
    result to the exit. `kill_s`: from a kill to the exit.
    """

    start_s: float = 120.0
    finish_s: float = 300.0
    stop_s: float = 120.0
    grace_s: float = 2.0
    settle_s: float = 0.5
    exit_s: float = 5.0
    kill_s: float = 5.0
    lease_every_s: float = LEASE_EVERY_S


class RunPhase(Enum):
    """Where the run stands; see the picture above."""

    STARTING = auto()
    RUNNING = auto()
    STOPPING = auto()
    FAILING = auto()
    CLOSING = auto()
    FINISHED = auto()


class Supervisor:
    """`handle` takes an input and its time, and returns actions; call `advance` at `deadline`."""

    def __init__(
        self, states: Sequence[RankState], *, now: float, limits: Limits | None = None
    ) -> None:
        """`states` are in rank order; their workers are about to be started."""
        self._limits = limits or Limits()
        self._states = list(states)
        self._interrupts = 0
        self._signs = 0
        self._steps = 0
        self._has_begun = False
        self._hurry = False
        self._outcome: RunOutcome | None = None
        self.phase = RunPhase.STARTING
        self.deadline: float | None = now + self._limits.start_s

    def handle(self, item: Input, now: float) -> list[Action]:
        """What to do now that this has happened."""
        if self.phase is RunPhase.FINISHED:
            return []
        if isinstance(item, Interrupted):
            self._interrupts += 1
            # During FAILING and CLOSING there is nothing to agree on any more: one Ctrl-C is enough
            # to hurry.
            self._hurry = (
                self._hurry
                or self._interrupts > 1
                or self.phase in (RunPhase.FAILING, RunPhase.CLOSING)
            )
        elif isinstance(item, DriverFailed):
            # A failure that came first may still be the cause of this one, and it names a rank.
            if self.phase not in (RunPhase.FAILING, RunPhase.CLOSING):
                self._close(now, RunOutcome("failed", EXIT_FAILED, item.problem), hurry=True)
        elif isinstance(item, RankInput):
            self._note(self._states[item.rank], item)
        return self.advance(now)

    def advance(self, now: float) -> list[Action]:
        """What to do because time has passed."""
        actions: list[Action] = []
        if self.phase is RunPhase.STARTING:
            actions += self._starting(now)
        if self.phase in (RunPhase.RUNNING, RunPhase.STOPPING):
            actions += self._running(now)
        if (
            self.phase is RunPhase.FAILING
            and self.deadline is not None
            and is_explained(self._states)
        ):
            self.deadline = min(self.deadline, now + self._limits.settle_s)
        if self.phase is RunPhase.FAILING and (
            self._hurry or self._is_due(now) or all(s.is_over for s in self._states)
        ):
            self._fail(now)
        if self.phase is RunPhase.CLOSING:
            actions += self._closing(now)
        return actions

    def _is_due(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline

    def _note(self, state: RankState, item: RankInput) -> None:
        had_failed = state.has_failed
        if isinstance(item, WorkerReady) and state.addresses:
            # The others have been sent the first addresses; in an elastic run a new process has a
            # state of its own.
            state.problem = state.problem or "said twice that it is ready"
        elif isinstance(item, WorkerReady):
            state.addresses = item.addresses
            state.versions = item.versions
        elif isinstance(item, Reported):
            self._has_begun = self._has_begun or not isinstance(item.event, Note)
            if isinstance(item.event, RankStep | StepDone):
                state.steps = item.event.step + 1  # steps are numbered from 0
                self._steps = max(self._steps, state.steps)
        elif isinstance(item, WorkerFinished):
            state.result = state.result or item.result
        elif isinstance(item, Exited):
            state.exit_code = item.code
            state.out_of_memory = item.out_of_memory
            state.lost = item.lost
        elif isinstance(item, HostSilent):
            state.is_silent = True
        elif isinstance(item, ProtocolViolation | NotStarted):
            state.problem = state.problem or item.problem
            state.never_started = state.never_started or isinstance(item, NotStarted)
        if state.has_failed and not had_failed:
            self._signs += 1
            state.sign = self._signs

    def _starting(self, now: float) -> list[Action]:
        waited_for = [state for state in self._states if not state.addresses]
        if any(state.is_over or state.has_failed for state in self._states):
            self._fail(now)  # no rank works yet, so the others have nothing to add
        elif self._interrupts:
            self._stop_before_it_began(now)
        elif not waited_for:
            self.phase, self.deadline = RunPhase.RUNNING, None
            return [SendRoster([RosterPeer(s.rank, s.host, s.addresses) for s in self._states])]
        elif self._is_due(now):
            cause = not_ready(waited_for, self._limits.start_s)
            self._close(now, failed_by(cause), hurry=True)
        return []

    def _running(self, now: float) -> list[Action]:
        late = [state for state in self._states if state.result is None]
        if self._hurry:
            self._stop_at_once("stopped at once by the user", now)
        elif any(state.has_failed for state in self._states):
            self.phase, self.deadline = RunPhase.FAILING, now + self._limits.grace_s
        elif not late:
            statuses = {state.result.status for state in self._states if state.result}
            self._close(now, ended(is_stopped="stopped" in statuses))
        elif self._interrupts and not self._has_begun:
            self._stop_before_it_began(now)  # they link up, or load a model: nothing to agree on
        elif self._interrupts and self.phase is RunPhase.RUNNING:
            self.phase, self.deadline = RunPhase.STOPPING, now + self._limits.stop_s
            return [SendStop(state.rank) for state in late]
        elif self._is_due(now) and self.phase is RunPhase.STOPPING:
            self._stop_at_once(self._not_stopped(late), now)
        elif self._is_due(now):
            cause = did_not_finish(late, self._limits.finish_s)
            self._close(now, failed_by(cause))
        elif len(late) < len(self._states) and self.deadline is None:
            self.deadline = now + self._limits.finish_s
        return []

    def _stop_at_once(self, reason: str, now: float) -> None:
        reason = f"{reason}; what came after the last checkpoint is lost"
        self._close(now, RunOutcome("stopped", EXIT_STOPPED_NOW, reason), hurry=True)

    def _not_stopped(self, late: Sequence[RankState]) -> str:
        return f"{names(late)} did not stop within {self._limits.stop_s:g} s"

    def _stop_before_it_began(self, now: float) -> None:
        outcome = RunOutcome("stopped", EXIT_STOPPED, "stopped by the user before training began")
        self._close(now, outcome, hurry=True)

    def _fail(self, now: float) -> None:
        self._close(now, failed_by(pick_cause(self._states)))
        # Nothing is saved any more, and a farewell to peers that are lost comes to nothing.
        self.deadline = now + min(self._limits.exit_s, self._limits.grace_s)

    def _close(self, now: float, outcome: RunOutcome, *, hurry: bool = False) -> None:
        self._hurry = self._hurry or hurry
        self._outcome = outcome
        self.phase, self.deadline = RunPhase.CLOSING, now + self._limits.exit_s

    def _closing(self, now: float) -> list[Action]:
        """Those who reported may leave on their own, for a while; all others are killed at once."""
        alive = [state for state in self._states if not state.is_gone]
        doomed = [
            s
            for s in alive
            if not s.killed
            and (self._hurry or s.result is None or s.is_silent or self._is_due(now))
        ]
        actions: list[Action] = [Kill(state.rank) for state in doomed]
        for state in doomed:
            state.killed = True
        unsure = all(state.killed for state in alive)
        if alive and unsure and doomed:
            self.deadline = now + self._limits.kill_s
        elif not alive or (unsure and self._is_due(now)):
            actions.append(Finish(self._final(alive)))
            self.phase, self.deadline = RunPhase.FINISHED, None
        return actions

    def _final(self, alive: Sequence[RankState]) -> RunOutcome:
        assert self._outcome is not None, "CLOSING is only entered with an outcome"
        reason = self._outcome.reason
        if alive:
            reason = f"{reason or 'the run is over'}; no sign of the end of {names(alive)}"
        for host in sorted({s.host for s in self._states if s.killed and s.lost is not None}):
            reason += f"; {host} is out of reach: what still runs there ends by itself"
        return replace(
            self._outcome,
            reason=reason,
            is_lost=self._outcome.is_lost and not self._interrupts,  # the user wants no new start
            steps=self._steps,
            versions=self._states[0].versions,
            summaries={
                state.rank: state.result.summary
                for state in self._states
                if state.result is not None
            },
        )


def ended(*, is_stopped: bool) -> RunOutcome:
    """A run that has come to a good end, its own or one that the user asked for."""
    if is_stopped:
        return RunOutcome("stopped", EXIT_STOPPED, "stopped by the user")
    return RunOutcome("done", EXIT_DONE)


def failed_by(cause: RootCause) -> RunOutcome:
    """A run that has failed, and why."""
    return RunOutcome(
        "failed",
        EXIT_FAILED,
        cause.reason,
        cause.rank,
        cause.host,
        out_of_memory=cause.out_of_memory,
        is_lost=cause.is_lost,
    )
