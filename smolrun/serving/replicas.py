"""The engines of a server, and which one a request runs on: the one with the least load.

    rank 0   8 slots, 3 choices   weights 1   <-- a new request
    rank 1   8 slots, 7 choices   weights 1
    rank 2   lost                             its requests continue on rank 0 or 1

Every replica is a rank with the whole model and an engine of its own; a pipeline is one engine,
that of rank 0. Replicas do not know each other: the driver has the token ids of every request, so
it can submit a request again, with the tokens that it has so far. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from smolrun.serving.messages import Ready, StageStats, Stats, Submit


@dataclass
class Replica:
    """One engine. `is_open`: it takes requests; it does not while its weights are replaced."""

    ready: Ready
    is_open: bool = True
    stats: Stats | None = None
    last_turn: int = 0  # the higher, the later it got its last request

    def can_run(self, submit: Submit, version: int | None) -> bool:
        """Whether a request fits, and would continue with the weights that it began with."""
        length = len(submit.prompt_ids) + submit.max_tokens
        return length <= self.ready.max_sequence_length and version in (None, self.ready.version)


@dataclass
class Replicas:
    """The engines that are there, by rank."""

    there: dict[int, Replica] = field(default_factory=dict)
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

    def add(self, rank: int, ready: Ready) -> None:
        """An engine takes requests from now on: a new one, or one with other weights."""
        self.there[rank] = Replica(ready)

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

    def choose(
        self, submit: Submit, load: Mapping[int, int], *, version: int | None = None
    ) -> int | None:
        """The rank for a request, least loaded for its slots; of equals, the one whose turn was
        longest ago. `load`: choices of every rank. None: no open one can run it."""
        able = {
            rank: one
            for rank, one in self.there.items()
            if one.is_open and one.can_run(submit, version)
        }
        if not able:
            return None

        def wait(rank: int) -> tuple[float, int]:
            return load.get(rank, 0) / able[rank].ready.max_running, able[rank].last_turn

        best = min(able, key=wait)
        self.take_turn(best)
        return best

    def take_turn(self, rank: int) -> None:
        """It gets a request now."""
        self._turn += 1
        self.there[rank].last_turn = self._turn

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
