"""The outputs of one request, from the engine's messages to the coroutine that reads them.

Also what another replica needs to continue the request. Everything runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from smolrun.serving.messages import Finished, Prefill, Recovering, Submit, Token
from smolrun.serving.replicas import continued


@dataclass(frozen=True)
class Queued:
    """A request waits for a slot, after `before` others."""

    before: int


Output = Token | Finished | Prefill | Recovering | Queued


class StreamFailed(Exception):
    """A request ended before its last token; the text is for the client."""


class Unavailable(Exception):
    """The engine takes no request now. `retry_after_s`: when to try again, in whole seconds;
    `is_full`: too many are waiting, otherwise it is not ready or is being shut down."""

    def __init__(self, message: str, retry_after_s: int, *, is_full: bool = False) -> None:
        self.retry_after_s = retry_after_s
        self.is_full = is_full
        super().__init__(message)


class OutputStream:
    """The outputs of one request, in order. Iterating ends after the last choice has finished, and
    raises StreamFailed where the engine fails or the reader falls behind by `max_buffered`."""

    def __init__(self, submit: Submit, now: float, max_buffered: int) -> None:
        self.submit = submit
        self.submitted_at = now
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.generated_tokens = 0
        self.cached_tokens = 0
        self.queued: int | None = None  # how many were before it when it was last counted
        self.waits_for_model = False  # it was unloaded when the request came
        self.open_choices = set(range(submit.choices))
        self.rank: int | None = None  # where it runs; None while no replica can take it
        self.ranks: list[int] = []  # all that it ran on
        self.losses = 0  # of replicas while they ran it
        self.version: int | None = None  # of the weights that its tokens are from
        self.sent_as = submit.request  # another name on each replica: late outputs have the old one
        self.tokens: dict[int, list[int]] = {choice: [] for choice in self.open_choices}
        self._scores = 0  # log-probabilities of the prompt that have come
        self._max_buffered = max_buffered
        self._outputs: deque[Output] = deque()
        self._failure: str | None = None
        self._changed = asyncio.Event()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> Output:
        while not self._outputs:
            if self._failure is not None:
                raise StreamFailed(self._failure)
            if not self.open_choices:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        if len(self._outputs) > 1:
            # Nothing else suspends a reader that lags: other clients, and the news that its own
            # client has left, would wait until it has caught up.
            await asyncio.sleep(0)
        return self._outputs.popleft()

    @property
    def has_outputs(self) -> bool:
        """Whether the next output is there already."""
        return bool(self._outputs)

    @property
    def has_ended(self) -> bool:
        """Whether no more outputs will come."""
        return self._failure is not None or not self.open_choices

    @property
    def has_begun(self) -> bool:
        """Whether the client may have seen what these weights have computed."""
        return any(self.tokens.values()) or self._scores > 0

    @property
    def bound_to(self) -> int | None:
        """The version of weights that it has to continue with; None: any."""
        return self.version if self.has_begun else None

    def completed(self) -> list[Finished]:
        """Of open choices whose last token has come, and the message that says so has not."""
        found = []
        for choice in sorted(self.open_choices):
            tokens = self.tokens[choice]
            if tokens and tokens[-1] in self.submit.stop_ids:
                found.append(Finished(self.sent_as, choice, "stop"))
            elif len(tokens) >= self.submit.max_tokens:
                found.append(Finished(self.sent_as, choice, "length"))
        return found

    def rest(self) -> Submit:
        """What is left to do, for another replica, or all of it for the first one."""
        tokens = {choice: self.tokens[choice] for choice in self.open_choices}
        rest = continued(self.submit, tokens, self._scores) if self.ranks else self.submit
        return msgspec.structs.replace(rest, request=self.sent_as, version=self.version or 0)

    def without_repeats(self, prefill: Prefill) -> Prefill:
        """Without the log-probabilities that an earlier replica has reported."""
        if prefill.logprobs is None:
            return prefill
        first = prefill.done - len(prefill.logprobs)
        new = prefill.logprobs[max(0, self._scores - first) :]
        self._scores = max(self._scores, prefill.done)
        return msgspec.structs.replace(prefill, logprobs=new)

    def elapsed_s(self) -> float:
        """From the request to its last token."""
        return (self.last_token_at or self.submitted_at) - self.submitted_at

    def push(self, output: Output) -> bool:
        """Add an output; False if the reader is too far behind."""
        if len(self._outputs) >= self._max_buffered and not isinstance(output, Finished):
            return False
        self._outputs.append(output)
        self._changed.set()
        return True

    def fail(self, message: str) -> None:
        """End the stream after the outputs that are there."""
        self._failure = message
        self._changed.set()


def queued(
    streams: Iterable[OutputStream], slots: Mapping[int, int]
) -> Iterator[tuple[OutputStream, int]]:
    """The requests that wait for a slot, in their order, each with how many are before it. `slots`:
    of every rank, which takes its requests in order."""
    running, waiting = Counter[int](), Counter[int]()
    for stream in streams:
        rank = stream.rank
        if rank is None or stream.has_ended or rank not in slots:
            continue
        if running[rank] >= slots[rank] and not stream.has_begun:
            yield stream, waiting[rank]
            waiting[rank] += 1
        running[rank] += len(stream.open_choices)
