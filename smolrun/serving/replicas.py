"""The engines of a server, and which one a request runs on: where its answer would end first.

    rank 0   8 slots, 3 choices, 20 ms a token   weights 300   <-- a new request
    rank 1   8 slots, 7 choices, 20 ms a token   weights 300   unless this one holds its long prompt
    rank 2   8 slots, 1 choice, 200 ms a token   weights 200
    rank 3   lost                                              its requests continue elsewhere

Every replica is a rank with the whole model and an engine of its own; a pipeline is one engine,
that of rank 0. Replicas do not know each other: the driver has the token ids of every request, so
it can submit a request again, with the tokens that it has so far. Pure.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from smolrun.serving.cache_slots import common_prefix
from smolrun.serving.memory_pressure import MemoryPressure
from smolrun.serving.messages import HostMemory, Ready, StageStats, Stats, Submit, Token

_ANSWER_TOKENS = 128  # that an answer is taken to have
_PROMPT_TOKEN = 0.1  # of the time of an answer's token: prompts are computed many at once
_MEASURED_GAPS = 32  # of the last ones, whose median is the time of a token
_LEAST_GAPS = 4
_ALIKE = 1.25  # a replica that takes so much longer is as fast: two measurements differ by as much


@dataclass
class Replica:
    """One engine. `is_open`: it takes requests; it does not while its weights are replaced."""

    ready: Ready
    is_open: bool = True
    pressure: MemoryPressure = field(default_factory=MemoryPressure)  # on its hosts
    stats: Stats | None = None
    last_turn: int = 0  # the higher, the later it got its last request
    gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MEASURED_GAPS))
    _held: deque[tuple[Sequence[int], Sequence[int]]] = field(default_factory=deque)
    _last_step: tuple[float, set[tuple[str, int]]] = (0.0, set())

    @property
    def token_s(self) -> float | None:
        """Seconds from a token of an answer to its next, if nothing else ran; None: not known."""
        return statistics.median(self.gaps_s) if len(self.gaps_s) >= _LEAST_GAPS else None

    def note_tokens(self, tokens: Sequence[Token], now_s: float) -> None:
        """The tokens of one step of the engine. A step of all slots is taken to last twice as long
        as that of one."""
        before_s, before = self._last_step
        choices = {(token.request, token.choice) for token in tokens}
        if choices & before:  # else prompts were computed meanwhile, or nothing
            share = len(choices) / self.ready.max_running
            self.gaps_s.append((now_s - before_s) / (1 + share))
        self._last_step = now_s, choices

    def hold(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """A request begins here; its slot will hold the prompt and `tokens`, to which later ones
        are added. The oldest one's slot is taken."""
        self._held.append((prompt, tokens))
        while len(self._held) > self.ready.max_running:
            self._held.popleft()

    def cached(self, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that would not be computed here: those that a slot begins with."""
        return max((_prefix(prompt, *held) for held in self._held), default=0)

    def can_run(self, submit: Submit, version: int | None) -> bool:
        """Whether a request fits, and would continue with the weights that it began with."""
        length = len(submit.prompt_ids) + submit.max_tokens
        return length <= self.ready.max_sequence_length and version in (None, self.ready.version)


@dataclass
class Replicas:
    """The engines that are there, by rank. `prefix_reuse`: they keep what they have computed."""

    there: dict[int, Replica] = field(default_factory=dict)
    prefix_reuse: bool = True
    min_free_gb: float | None = None  # as MemoryPressure takes it
    _turn: int = 0

    @property
    def ready(self) -> Ready | None:
        """All that are open as one: a request must fit on any of them. None: there is none."""
        found = [one.ready for _, one in sorted(self.there.items()) if one.is_open]
        if not found:
            return None
        return Ready(
            min(one.max_sequence_length for one in found),
            min(one.cache_tokens for one in found),
            sum(one.max_running for one in found),
            [stage for one in found for stage in one.stages],
            max(one.version for one in found),
        )

    @property
    def stats(self) -> dict[int, Stats]:
        """The last figures of every rank."""
        return {rank: one.stats for rank, one in self.there.items() if one.stats is not None}

    @property
    def stages(self) -> list[StageStats]:
        """Of all engines, with their last figures."""
        found = [one for _, one in sorted(self.there.items())]
        return [
            stage for one in found for stage in (one.stats and one.stats.stages) or one.ready.stages
        ]

    def summary(self, load: Mapping[int, int]) -> list[dict[str, Any]]:
        """Of every engine that is there; `step` of the checkpoint that its weights are from."""
        return [
            {
                "rank": rank,
                "step": one.ready.version or None,
                "takes_requests": one.is_open,
                "choices": load.get(rank, 0),
                "tokens_per_s": None if one.token_s is None else round(1 / one.token_s, 2),
            }
            for rank, one in sorted(self.there.items())
        ]

    def add(self, rank: int, ready: Ready) -> None:
        """An engine takes requests from now on: a new one, or one with other weights."""
        pressure = MemoryPressure(self.min_free_gb, ready.stages, ready.max_running)
        new = Replica(ready, pressure=pressure)
        if (old := self.there.get(rank)) is not None:
            new.gaps_s = old.gaps_s
        self.there[rank] = new

    def lose(self, rank: int) -> None:
        """It is gone, or does not answer."""
        self.there.pop(rank, None)

    def set_open(self, rank: int, *, is_open: bool) -> None:
        """Whether it takes requests; nothing where it is not there."""
        if (replica := self.there.get(rank)) is not None:
            replica.is_open = is_open

    def note(self, rank: int, stats: Stats) -> None:
        """What it reports of itself."""
        if (replica := self.there.get(rank)) is not None:
            replica.stats = stats

    def note_memory(self, rank: int, report: HostMemory) -> None:
        """The memory of one of its hosts."""
        if (replica := self.there.get(rank)) is not None:
            replica.pressure.note(report)

    def memory_low(self, load: Mapping[int, int], rank: int | None = None) -> str | None:
        """Why no open replica, or not that of `rank`, has memory for a request; None: one has."""
        reasons = [
            one.pressure.reason(load.get(number, 0))
            for number, one in sorted(self.there.items())
            if one.is_open and rank in (None, number)
        ]
        return reasons[0] if all(reasons) and reasons else None

    def choose(
        self, submit: Submit, load: Mapping[int, int], *, version: int | None = None
    ) -> int | None:
        """The rank where a request would end first, by the speed of each, its load, and the part of
        the prompt that it holds; of equals, the one whose turn was longest ago; one whose hosts
        lack memory only if all others do too. `load`: choices of every rank. None: no open one can
        run it."""
        able = {
            rank: one
            for rank, one in self.there.items()
            if one.is_open and one.can_run(submit, version)
        }
        fastest_s = min((one.token_s for one in able.values() if one.token_s), default=None)

        def wait(rank: int) -> tuple[bool, float, int]:
            one, choices = able[rank], load.get(rank, 0)
            is_low = one.pressure.reason(choices) is not None
            cached = one.cached(submit.prompt_ids) if self.prefix_reuse else 0
            tokens = _ANSWER_TOKENS + _PROMPT_TOKEN * (len(submit.prompt_ids) - cached)
            busy = 1 + choices / one.ready.max_running
            return is_low, tokens * busy * _slowness(one.token_s, fastest_s), one.last_turn

        return min(able, key=wait, default=None)

    def assign(self, rank: int, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """It gets a request now; `tokens` of its answer, to which later ones are added."""
        self._turn += 1
        self.there[rank].last_turn = self._turn
        self.there[rank].hold(prompt, tokens)

    def is_hopeless(self, submit: Submit, version: int | None) -> bool:
        """Whether waiting is in vain: engines are there, and none of them can run the request."""
        return bool(self.there) and not any(
            one.can_run(submit, version) for one in self.there.values()
        )


def continued(submit: Submit, tokens: Mapping[int, list[int]], scores: int) -> Submit:
    """The request for another replica: `tokens` of its open choices so far. Log-probabilities of
    the prompt are asked for again unless all of them have come (`scores`)."""
    has_echo = submit.echo_logprobs and scores < len(submit.prompt_ids)
    return msgspec.structs.replace(submit, continued=dict(tokens), echo_logprobs=has_echo)


def _prefix(prompt: Sequence[int], held: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens of a prompt are those of another one and of its answer."""
    alike = common_prefix(held, prompt)
    return alike + (common_prefix(tokens, prompt[alike:]) if alike == len(held) else 0)


def _slowness(token_s: float | None, fastest_s: float | None) -> float:
    """How much longer a token takes than on the fastest replica; 1 for what is not known yet."""
    if token_s is None or not fastest_s or token_s <= _ALIKE * fastest_s:
        return 1.0
    return token_s / fastest_s
