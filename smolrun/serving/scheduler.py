"""Which tokens the next batch brings to the stages: continuous batching with chunked prefill.

    waiting --> (a free slot) --> prefill, in chunks --> decode, one token a batch --> finished

Every batch holds one token of each sequence that decodes and a chunk of the prompts, so a long
prompt delays running answers by one chunk at a time. A batch takes a share of the sequences only,
so that as many batches are in flight as there are stages:

    stage 0   A1 B1 A2 B2 A3 ...
    stage 1      A1 B1 A2 B2 ...     the next token of A is known: A2 may start

A sequence is admitted when a slot is free; a slot has room for its prompt and all tokens it may
generate, on every stage, so that nothing runs out half-way. First come, first served. Pure: knows
no tensors, threads or clock. Source: Orca (OSDI 2022), Sarathi-Serve (arXiv:2403.02310).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain

from smolrun.errors import ProtocolError
from smolrun.serving.batch import Batch, BatchResult, Fork, Opened, Row, Sampled
from smolrun.serving.cache_slots import CacheSlots
from smolrun.serving.messages import (
    Cancel,
    Finished,
    FinishReason,
    Prefill,
    Score,
    Stats,
    StepOutput,
    Submit,
    Token,
)
from smolrun.serving.sequence import Sequence, sequences_of

# Fewer tokens at once leave a processor's matrix units idle.
_LEAST_CHUNK_TOKENS = 32


class Scheduler:
    """Sequences in, batches out; results in, tokens out (`take_output`)."""

    def __init__(
        self,
        *,
        slots: int,
        capacity: int,
        vocab_size: int,
        stages: int = 1,
        chunk_tokens: int = 256,
        prefix_reuse: bool = True,
    ) -> None:
        """`slots` sequences of `capacity` tokens run at one time, in as many batches as there are
        `stages`; a batch has at most `chunk_tokens` tokens of prompts (at least `slots`).
        `prefix_reuse`: a request may begin with tokens that another one has computed; choices of
        one request always share its prompt."""
        self.slots = CacheSlots(slots, capacity)
        self._vocab_size = vocab_size
        self.num_stages = stages
        self._most_chunk_tokens = max(chunk_tokens, slots)  # at least one for every prompt
        self._chunk_tokens = self._most_chunk_tokens
        self._prefix_reuse = prefix_reuse
        self._waiting: deque[Sequence] = deque()
        # Other choices of a request, until its first one has brought the prompt to a slot.
        self._held: dict[str, list[Sequence]] = {}
        self._running: list[Sequence] = []  # in order of admission
        self._in_flight: dict[int, list[tuple[Sequence, Row]]] = {}  # by batch, oldest first
        self._next_number = 0
        self._output = StepOutput()
        self.reset_totals()

    @property
    def num_in_flight(self) -> int:
        """Batches whose result has not come."""
        return len(self._in_flight)

    @property
    def chunk_tokens(self) -> int:
        """The most tokens of prompts in a batch."""
        return self._chunk_tokens

    @property
    def has_requests(self) -> bool:
        """Whether a request has not finished."""
        return bool(self._waiting or self._running or self._held)

    def stats(self) -> Stats:
        """The load now; totals count a prompt once for all its choices."""
        used = sum(sequence.max_length for sequence in self._running)
        waiting = len(self._waiting) + sum(map(len, self._held.values()))
        usage = used / (len(self.slots) * self.slots.capacity)
        return Stats(
            len(self._running),
            waiting,
            usage,
            self._prompt_tokens,
            self._generated_tokens,
            self._cached_tokens,
        )

    def reset_totals(self) -> None:
        """Forget what has been counted so far."""
        self._prompt_tokens = self._generated_tokens = self._cached_tokens = 0

    def limit_chunks(self, tokens: int) -> None:
        """At most so many tokens of prompts from the next batch on, within what was configured."""
        least = max(len(self.slots), _LEAST_CHUNK_TOKENS)
        self._chunk_tokens = min(self._most_chunk_tokens, max(least, tokens))

    def take_over(self, lost: Scheduler) -> None:
        """The requests of a scheduler whose stages are lost, and its totals. Those that ran come
        first and are computed again, with the tokens that they had generated; one that does not fit
        into a slot any more ends with an error."""
        self._prompt_tokens += lost._prompt_tokens
        self._generated_tokens += lost._generated_tokens
        self._cached_tokens += lost._cached_tokens
        again = lost._running
        self._held |= lost._held
        self._waiting.extend([*again, *lost._waiting])
        for sequence in again:
            sequence.was_admitted = True
        for sequence in [*self._waiting, *chain.from_iterable(self._held.values())]:
            length_before = sequence.max_length
            sequence.restart(self.slots.capacity)
            # One of a prompt alone has all its tokens from the start.
            if len(sequence.tokens) >= sequence.max_length < length_before:
                problem = f"a host was lost, and a slot has {self.slots.capacity} tokens since then"
                self._finish(sequence, "error", problem)

    def take_output(self) -> StepOutput:
        """Everything that has happened since the last call."""
        output, self._output = self._output, StepOutput()
        return output

    # -- requests ----

    def submit(self, request: Submit) -> None:
        """Queue a request; one that cannot run finishes at once with an error."""
        first, *others = sequences_of(request, self.slots.capacity)
        if problem := self._problem(request):
            for sequence in (first, *others):
                self._finish(sequence, "error", problem)
            return
        self._waiting.append(first)
        if others:
            self._held[request.request] = others

    def cancel(self, cancel: Cancel) -> None:
        """End choices of a request; their slots are free for the next batch. No effect on those
        that have finished."""
        held = chain.from_iterable(self._held.values())
        for sequence in [*self._running, *self._waiting, *held]:
            is_meant = cancel.choice in (None, sequence.choice)
            if sequence.request.request == cancel.request and is_meant:
                self._finish(sequence, "cancelled")

    def cancel_all(self) -> None:
        """End every request."""
        for request in {one.request.request: None for one in [*self._running, *self._waiting]}:
            self.cancel(Cancel(request))

    def _problem(self, request: Submit) -> str:
        """Why a request cannot run; empty if it can."""
        length, capacity = len(request.prompt_ids), self.slots.capacity
        if not 1 <= length <= capacity:
            return f"the prompt has {length} tokens; 1 to {capacity} are possible"
        given = [token for tokens in request.continued.values() for token in tokens]
        token = max([*request.prompt_ids, *given, *request.sampling.logit_bias])
        if token >= self._vocab_size:
            return f"token {token} is not in the vocabulary of {self._vocab_size} tokens"
        if request.choices < 1 or request.max_tokens < 0:
            return f"choices={request.choices}, max_tokens={request.max_tokens} are not possible"
        if any(len(tokens) >= request.max_tokens for tokens in request.continued.values()):
            return f"a choice has {request.max_tokens} tokens already, or more"
        known = [*self._running, *self._waiting]
        if any(sequence.request.request == request.request for sequence in known):
            return f"a request {request.request} is running already"
        return ""

    def _finish(self, sequence: Sequence, reason: FinishReason, message: str = "") -> None:
        sequence.is_finished = True
        if sequence.slot is not None:
            # After an error the slot may hold values that are not finite.
            self.slots.release(sequence.slot, keep=reason != "error")
            sequence.slot = None
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        request = sequence.request.request
        if sequence in self._held.get(request, []):
            self._held[request].remove(sequence)
        elif sequence.is_first:
            self._admit_other_choices(sequence)
        if not self._held.get(request, [True]):
            del self._held[request]
        self._output.finished.append(
            Finished(request, sequence.choice, reason, sequence.cached, message)
        )

    # -- schedule ----

    def schedule(self) -> Batch | None:
        """The next batch; None while there is nothing to run, or a batch in flight per stage."""
        if len(self._in_flight) >= self.num_stages:
            return None
        forks, opened = self._admit()
        chosen = [*self._decoding(), *self._prefilling()]
        if not chosen:
            return None
        number = self._next_number
        self._next_number += 1
        pairs = [(sequence, self._row(sequence, count, number)) for sequence, count in chosen]
        self._in_flight[number] = pairs
        token_ids = [
            token
            for sequence, row in pairs
            for token in sequence.tokens[row.start : row.start + row.count]
        ]
        return Batch(number, [row for _, row in pairs], token_ids, forks, opened)

    def _admit(self) -> tuple[list[Fork], list[Opened]]:
        """Give waiting sequences the free slots."""
        forks, opened = [], []
        while self._waiting and self.slots.num_free:
            sequence = self._waiting.popleft()
            request = sequence.request
            # Log-probabilities of a prompt need all its logits.
            reuse = not sequence.is_first or (self._prefix_reuse and not request.echo_logprobs)
            slot, cached, fork = self.slots.take(sequence.tokens, reuse=reuse)
            sequence.slot, sequence.scheduled = slot, cached
            if fork is not None:
                forks.append(fork)
            history = sequence.tokens[:cached]
            opened.append(
                Opened(
                    slot,
                    request.sampling,
                    sequence.choice,
                    request.top_logprobs,
                    history,
                    sequence.prompt_length,
                )
            )
            self._running.append(sequence)
            if sequence.is_first and not sequence.was_admitted:
                self._prompt_tokens += sequence.prompt_length
                self._cached_tokens += cached
                sequence.cached = cached
        return forks, opened

    def _decoding(self) -> Iterable[tuple[Sequence, int]]:
        """A share of the sequences that have a new token, those that waited longest first."""
        after_prompt = [sequence for sequence in self._running if not sequence.prefill_left]
        share = -(-len(after_prompt) // self.num_stages)
        ready = [sequence for sequence in after_prompt if sequence.pending]
        ready.sort(key=lambda sequence: sequence.last_batch)
        # By slot: a stage computes the attention of neighbouring slots in one product.
        chosen = sorted(ready[:share], key=lambda sequence: sequence.slot or 0)
        return [(sequence, 1) for sequence in chosen]

    def _prefilling(self) -> Iterable[tuple[Sequence, int]]:
        """Chunks of prompts. All share the chunk's tokens, so a short prompt does not wait for the
        end of a long one."""
        prefilling = [sequence for sequence in self._running if sequence.prefill_left]
        # What short ones leave goes to longer ones.
        prefilling.sort(key=lambda sequence: sequence.prefill_left)
        chunks, left = [], self._chunk_tokens
        for index, sequence in enumerate(prefilling):
            count = min(_chunk_left(sequence), -(-left // (len(prefilling) - index)))
            if count:
                chunks.append((sequence, count))
                left -= count
        return chunks

    def _row(self, sequence: Sequence, count: int, number: int) -> Row:
        """The row of the next `count` tokens of a sequence; they are scheduled from now on."""
        assert sequence.slot is not None, "a sequence that runs has a slot"
        start, end = sequence.scheduled, sequence.scheduled + count
        request = sequence.request
        self.slots.append(sequence.slot, sequence.tokens[start:end])
        sequence.scheduled, sequence.last_batch = end, number
        if sequence.is_first and end >= sequence.prompt_length:
            self._admit_other_choices(sequence)
        is_sampled = end == len(sequence.tokens) < sequence.max_length
        is_echoed = (
            request.echo_logprobs
            and sequence.is_first
            and sequence.reported <= start < sequence.prompt_length
        )
        following = request.prompt_ids[end : end + 1] if is_echoed else []
        return Row(sequence.slot, start, count, is_sampled, is_echoed, next(iter(following), None))

    def _admit_other_choices(self, first: Sequence) -> None:
        """The prompt of a request is in a slot, or will never be: its other choices are next."""
        self._waiting.extendleft(reversed(self._held.pop(first.request.request, [])))

    # -- results ----

    def update(self, result: BatchResult) -> None:
        """Take the result of the oldest batch in flight; ProtocolError if it is not its result."""
        number = next(iter(self._in_flight), None)
        if result.number != number:
            raise ProtocolError(f"a result of batch {result.number} where {number} was due")
        pairs = self._in_flight.pop(result.number)
        sampled = {one.slot: one for one in result.sampled}
        logprobs = {one.slot: one.values for one in result.prompt_logprobs}
        counts = {slot: len(values) for slot, values in logprobs.items()}
        if (
            sampled.keys() != {row.slot for _, row in pairs if row.is_sampled}
            or any(not 0 <= one.token_id < self._vocab_size for one in result.sampled)
            or counts != {row.slot: row.num_logprobs for _, row in pairs if row.logprobs}
        ):
            raise ProtocolError(f"the result of batch {result.number} does not fit it")
        for sequence, row in pairs:
            if sequence.is_finished:
                continue  # it was cancelled meanwhile
            done = min(row.start + row.count, sequence.prompt_length)
            if done > max(row.start, sequence.reported) and sequence.is_first:
                self._report_prefill(sequence, row, logprobs.get(row.slot))
            if row.is_sampled:
                self._add_token(sequence, sampled[row.slot])
            elif row.start + row.count == len(sequence.tokens):
                self._finish(sequence, "length")  # a prompt that nothing may follow

    def _report_prefill(self, sequence: Sequence, row: Row, values: list[Score] | None) -> None:
        first: list[Score | None] = [None] if row.start == 0 else []
        logprobs = None if values is None else [*first, *values]
        total = sequence.prompt_length
        done = sequence.reported = min(row.start + row.count, total)
        request, cached = sequence.request.request, sequence.cached
        self._output.prefill.append(Prefill(request, done, total, logprobs, cached))

    def _add_token(self, sequence: Sequence, sampled: Sampled) -> None:
        request, choice, token = sequence.request, sequence.choice, sampled.token_id
        if sampled.error is not None:
            self._finish(sequence, "error", sampled.error)
            return
        sequence.tokens.append(token)
        self._generated_tokens += 1
        self._output.tokens.append(
            Token(request.request, choice, token, sampled.logprob, sampled.top)
        )
        if token in request.stop_ids:
            self._finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.max_length:
            self._finish(sequence, "length")


def _chunk_left(sequence: Sequence) -> int:
    """The longest chunk; where log-probabilities of the prompt are asked for, all or none of its
    tokens have them, and none twice."""
    if not (sequence.request.echo_logprobs and sequence.is_first):
        return sequence.prefill_left
    ends = [sequence.reported, sequence.prompt_length, len(sequence.tokens)]
    return next(end for end in ends if end > sequence.scheduled) - sequence.scheduled
