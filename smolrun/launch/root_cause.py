"""Which rank broke the run, and the one line that says so.

When one rank dies, all others fail too: they report that they lost it. So signs are weighed, not
just timed: a rank that died without a word beats one that reported an error of its own, and that
beats ranks that only lost another one. Pure.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

from smolrun.errors import BROKE_PROTOCOL
from smolrun.launch.control import (
    EXIT_ABANDONED,
    EXIT_ABORTED,
    OUT_OF_MEMORY,
    Address,
    ErrorReport,
    ResultMessage,
)

# Errors that a healthy rank reports because of another one.
_SECOND_HAND = frozenset({"PeerLost", "WaitTimeout", "MeshClosed"})
_MESSAGE_CHARS = 600


@dataclass
class RankState:
    """What is known of one rank. `sign` numbers the first signs of failure in order; 0 is none."""

    rank: int
    host: str
    log: str
    has_steps: bool = True  # what it does is counted in steps
    addresses: list[Address] = field(default_factory=list)  # where it listens, once it does
    versions: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    result: ResultMessage | None = None
    exit_code: int | None = None
    problem: str | None = None
    never_started: bool = False
    killed: bool = False
    out_of_memory: str | None = None
    lost: str | None = None  # why its host is out of reach
    is_silent: bool = False  # its host did not answer the driver when the run began to fail
    sign: int = 0

    @property
    def is_gone(self) -> bool:
        """No process of this rank runs any more."""
        return self.exit_code is not None or self.never_started

    @property
    def is_over(self) -> bool:
        """Nothing more is to be expected of this rank."""
        return self.is_gone or self.result is not None

    @property
    def has_failed(self) -> bool:
        """This rank cannot bring the run to a good end."""
        if self.result is not None:
            return self.result.status == "failed" or self.problem is not None
        return self.problem is not None or self.is_gone

    @property
    def error(self) -> ErrorReport | None:
        """The error it reported itself."""
        if self.result is None or self.result.status != "failed":
            return None
        return self.result.error or ErrorReport("Error", "it failed without saying why")

    @property
    def label(self) -> str:
        """As people read it: rank 2 on mini3."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class RootCause:
    """The rank that broke the run, and the line about it."""

    rank: int
    host: str
    reason: str
    out_of_memory: bool = False
    is_lost: bool = False  # the rank is gone or out of reach; nothing says that it did wrong


def names(states: Sequence[RankState]) -> str:
    """A list of ranks for a sentence."""
    return ", ".join(state.label for state in states)


def not_ready(late: Sequence[RankState], limit_s: float) -> RootCause:
    """The cause when ranks take too long to start."""
    state = late[0]
    reason = f"{names(late)} not ready within {limit_s:g} s; log: {state.log}"
    return RootCause(state.rank, state.host, reason, is_lost=True)


def did_not_finish(late: Sequence[RankState], limit_s: float) -> RootCause:
    """The cause when some ranks were done long ago and `late` ones still are not."""
    state = late[0]
    reason = f"{names(late)} did not finish within {limit_s:g} s after the others; log: {state.log}"
    return RootCause(state.rank, state.host, reason, is_lost=True)


def pick_cause(states: Sequence[RankState]) -> RootCause:
    """The first rank of the gravest kind of failure; at least one must be over or have failed."""
    signs = sorted((state for state in states if state.has_failed), key=lambda state: state.sign)
    for is_grave in (_is_dead, _has_own_error):
        if grave := [state for state in signs if is_grave(state)]:
            return _cause(grave[0], states, _what_happened(grave[0]))
    if blamed := _blamed(states, signs):
        return blamed
    if signs:
        return _cause(signs[0], states, _what_happened(signs[0]))
    early = next(state for state in states if state.is_over)
    return _cause(early, states, "reported its end before the run began")


def is_explained(states: Sequence[RankState]) -> bool:
    """Whether every rank that has not reported is one that the others say they lost."""
    accused = {state.error.peer for state in states if state.error is not None}
    return all(state.is_over or state.rank in accused for state in states)


def _is_dead(state: RankState) -> bool:
    return state.error is None


def _has_own_error(state: RankState) -> bool:
    return state.error is not None and state.error.kind not in _SECOND_HAND


def _blamed(states: Sequence[RankState], signs: Sequence[RankState]) -> RootCause | None:
    """The rank that the others lost, or waited for in vain: by `_weight`."""
    by_rank = {state.rank: state for state in states}
    accused = [
        (by_rank[s.error.peer], s.error) for s in signs if s.error and s.error.peer in by_rank
    ]
    if not accused:
        return None
    votes = Counter(state.rank for state, _ in accused)
    state, error = min(accused, key=lambda one: _weight(one[0], one[1], votes[one[0].rank]))
    pair = {state.rank}
    if error.broke_protocol:
        what = "broke the protocol of the mesh"
    elif error.kind == "WaitTimeout":
        what = "did not do its part"
    else:
        what = "was cut off from the others" if state.is_over else "stopped answering"
        seen = [(other, e) for other in signs if (e := other.error) and _saw(e, state.rank)]
        error = seen[0][1] if seen else error
        if len(seen) == 1 and not state.is_silent and state.error and state.error.peer is not None:
            # Both are alive and answer the driver, and no other rank has lost either.
            what = f"and {seen[0][0].label} lost each other"
            pair.add(seen[0][0].rank)
    reported = _one_line(error.message).removeprefix(f"lost rank {state.rank}: ")
    reported = reported.removeprefix(f"{BROKE_PROTOCOL}: ")
    cause = _cause(state, states, f"{what}{_when(state)} ({reported})", pair)
    return replace(cause, is_lost=not error.broke_protocol)


def _weight(state: RankState, error: ErrorReport, num_votes: int) -> tuple[int | bool, ...]:
    """Of all accusations, the one with the least weight names the cause.

    Bytes that break the protocol are evidence, while the end of a link is what everyone sees
    afterwards, the culprit too. A wait that ended while all links stood comes before the losses
    that its own end causes. Then: a host that does not answer the driver either, a rank that has
    not reported, many votes, the lower rank."""
    return (
        not error.broke_protocol,
        error.kind != "WaitTimeout",
        not state.is_silent,
        state.is_over,
        -num_votes,
        state.rank,
    )


def _saw(error: ErrorReport, rank: int) -> bool:
    """Whether it lost that rank itself, rather than learning it from another one."""
    return error.peer == rank and error.reported_by is None


def _what_happened(state: RankState) -> str:
    if state.problem is not None:
        what = (
            "could not be started: " if state.never_started else "broke the control protocol: it "
        )
        return what + _one_line(state.problem) + ("" if state.never_started else _when(state))
    if memory := _out_of_memory(state):
        # What the system did is known of some process only, not of this one.
        what = "may have run out of memory" if state.error is None else "ran out of memory"
        return f"{what}{_when(state)}: {_one_line(memory)}"
    if state.error is not None:
        return f"failed{_when(state)}: {state.error.kind}: {_one_line(state.error.message)}"
    if state.lost is not None:
        return f"is out of reach{_when(state)}: {state.lost}; what runs there ends by itself"
    hint = "; was its memory full?" if state.exit_code == -9 else ""
    return f"{describe_exit(state.exit_code or 0)}{_when(state)}{hint}"


def _out_of_memory(state: RankState) -> str | None:
    """What is known of it, if that is why the rank failed, or probably: by its own word or by the
    system's."""
    if state.error is not None and state.error.kind == OUT_OF_MEMORY:
        return state.error.message
    return state.out_of_memory if state.error is None else None


def describe_exit(code: int) -> str:
    """How a process ended that was still needed."""
    if code < 0:
        try:
            meaning = (signal.strsignal(-code) or "unknown").lower()
        except ValueError:
            meaning = "unknown"
        return f"died from signal {-code} ({meaning})"
    if code == EXIT_ABANDONED:
        return "gave up, because it no longer heard the driver (was this machine asleep or frozen?)"
    if code == EXIT_ABORTED:
        return "was told to end at once"
    if code == 0:
        return "ended without a result"
    # Windows reports a crash as a number like 0xC0000005.
    return f"died with exit code {code if code < 256 else hex(code)}"


def _when(state: RankState) -> str:
    if state.steps:
        return f" at step {state.steps}"  # the one it was busy with, as steps are numbered from 0
    if not state.addresses:
        return " while it started"
    return " before its first step" if state.has_steps else ""


def _cause(
    state: RankState, states: Sequence[RankState], what: str, named: Set[int] = frozenset()
) -> RootCause:
    others = sum(1 for other in states if other is not state and other.rank not in named)
    it = "them" if len(named) > 1 else "it"
    ended = f"; {others} other rank{'s' if others > 1 else ''} ended with {it}" if others else ""
    reason = f"{state.label} {what}{ended}; log: {state.log}"
    has_own = state.problem is None and _out_of_memory(state) is not None
    is_lost = not has_own and _is_lost(state)
    return RootCause(state.rank, state.host, reason, has_own, is_lost)


def _is_lost(state: RankState) -> bool:
    """Whether another start could go better: the rank went without a word, or never came, or it
    only reports others. An error of its own would come again."""
    if state.problem is not None:
        return state.never_started
    if state.error is not None:
        return state.error.kind in _SECOND_HAND
    return state.result is None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MESSAGE_CHARS else line[:_MESSAGE_CHARS] + " ..."
