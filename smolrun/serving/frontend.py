"""The bridge between the HTTP server's event loop and the engines: rank 0's, or every replica's.

    HTTP thread                                              driver's thread
      submit() -> OutputStream  -- send(Submit), any thread -->    a rank
      async for output    <-- call_soon_threadsafe ------    on_message(StepOutput)

Everything but `on_message`, `lose`, `vacate` and `fail` runs on the event loop. Requests that
wait are counted and bounded here, so that a refusal takes no work; a stream whose reader is slow
has a bounded buffer. The requests of a lost replica are submitted to another one, with the tokens
that they have; an engine draws the same ones next, as noise is a function of seed, choice and
position. Knows nothing of HTTP, text or sockets.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from smolrun.serving.http_metrics import ServingMetrics
from smolrun.serving.messages import (
    Cancel,
    Finished,
    FinishReason,
    FromEngine,
    HostMemory,
    Prefill,
    Ready,
    Recovering,
    Retire,
    StepOutput,
    Submit,
    ToEngine,
    Token,
)
from smolrun.serving.output_stream import OutputStream, Queued, Unavailable, queued
from smolrun.serving.replicas import Replicas

State = Literal["starting", "ready", "recovering", "unloaded", "loading", "draining", "failed"]
# Requests are taken in these; in all but the first they wait until the model is loaded again.
ANSWERING: tuple[State, ...] = ("ready", "unloaded", "loading")

_RATE_WINDOW = 32  # finished choices that the rate is measured over
_MAX_RETRY_S = 60
_LOOK_S = 0.1
_MOST_LOSSES = 3  # of the replicas of a request: it may be what ends them
_MEMORY_RETRY_S = 10


class Frontend:
    """Requests of all clients. `send` takes a message for a rank from any thread and never blocks.

    At most `max_waiting` choices wait beside those that the engines run at once. `num_replicas`:
    ranks 0 and up that have an engine. `prefix_reuse`: as of Load.
    """

    def __init__(
        self,
        send: Callable[[int, ToEngine], None],
        *,
        num_replicas: int = 1,
        prefix_reuse: bool = True,
        max_waiting: int = 64,
        max_buffered: int = 8192,
        min_free_gb: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._max_waiting = max_waiting
        self._max_buffered = max_buffered
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self.num_replicas = num_replicas
        self.replicas = Replicas(prefix_reuse=prefix_reuse, min_free_gb=min_free_gb)
        self._unloaded: Ready | None = None  # what the engines were that are to be loaded again
        self.is_wanted = False  # a request has come since the model was unloaded
        self._streams: dict[str, OutputStream] = {}  # by their names on the replicas
        self._ends: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._idle = asyncio.Event()
        self._idle.set()
        self.state: State = "starting"
        self.reason = "the model is being loaded"
        self.metrics = ServingMetrics()
        self._idle_since_s = clock()

    # --- the driver's thread ---------------------------------------------------------------------

    def on_message(self, message: FromEngine, rank: int = 0) -> None:
        """A message of a rank; from any thread, never blocks."""
        self._call(self._deliver, message, rank)

    def lose(self, rank: int, reason: str) -> None:
        """A replica is gone: its requests continue on others; from any thread."""
        self._call(self._lose, rank, reason)

    def vacate(self, rank: int, wait_s: float, then: Callable[[], None]) -> None:
        """A replica takes no requests until it is ready again. Those that it has not begun to
        answer move to others at once, the rest after `wait_s`, where others have the same weights;
        `then` is called on the event loop once it runs none. From any thread."""
        self._call(self._vacate, rank, wait_s, then)

    def fail(self, reason: str) -> None:
        """No engine will answer any more: every running request ends with an error; from any
        thread."""
        self._call(self._fail, reason)

    def note_memory(self, report: HostMemory) -> None:
        """How much memory the host of a rank has; from any thread."""
        engine = report.rank if self.num_replicas > 1 else 0
        self._call(self.replicas.note_memory, engine, report)

    def unload(self, after_s: float, begin: Callable[[], None]) -> None:
        """Where nothing was asked for `after_s`: from now on requests wait until the model is
        loaded again, and `begin()` is called on the event loop. From any thread."""
        self._call(self._unload, after_s, begin)

    def begin_loading(self) -> None:
        """The model is being loaded again; from any thread."""
        self.is_wanted = False
        self._call(self._begin_loading)

    def stay_unloaded(self, reason: str) -> None:
        """The model could not be loaded again: requests that wait for it end with an error, and the
        next one tries again. From any thread."""
        self._call(self._stay_unloaded, reason)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        loop = self._loop
        if loop is None:
            raise RuntimeError("the HTTP server has not been started")
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed, and with it every connection
            pass

    # --- the event loop --------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that everything else runs on; before the first message."""
        self._loop = loop

    @property
    def num_requests(self) -> int:
        """Requests whose answers are not delivered yet, also those that the engine is done with."""
        return len(self._streams)

    @property
    def in_flight(self) -> int:
        """Choices that run or wait."""
        return sum(len(stream.open_choices) for stream in self._streams.values())

    @property
    def ready(self) -> Ready | None:
        """All engines that take requests, or will once they are loaded again, as one; None where
        there is none."""
        return self.replicas.ready or self._unloaded

    @property
    def load(self) -> Counter[int]:
        """Choices that run or wait on every rank."""
        counts: Counter[int] = Counter()
        for stream in self._streams.values():
            if stream.rank is not None and not stream.has_ended:
                counts[stream.rank] += len(stream.open_choices)
        return counts

    @property
    def waiting(self) -> int:
        """Choices beyond those that the engines can run at once."""
        ready = self.ready
        return max(0, self.in_flight - (ready.max_running if ready else 0))

    def check_room(self, choices: int = 1, rank: int | None = None) -> None:
        """Raises Unavailable where there is no room for a request, on any replica or on that of
        `rank`; for no choices only where no engine is ready."""
        ready = self.ready
        if self.state not in ANSWERING or ready is None:
            self.metrics.refused.labels("not_ready").inc()
            raise Unavailable(self.reason, 1 if self.state == "draining" else 5)
        if rank is not None and not (
            rank in self.replicas.there and self.replicas.there[rank].is_open
        ):
            self.metrics.refused.labels("not_ready").inc()
            raise Unavailable(f"rank {rank} takes no requests now; leave worker_rank out", 5)
        if choices and (reason := self.memory_low(rank)):
            self.metrics.refused.labels("memory").inc()
            raise Unavailable(reason, _MEMORY_RETRY_S)
        # A single request may be larger than the queue when nothing else is there.
        most = ready.max_running + self._max_waiting
        if choices and self._streams and self.in_flight + choices > most:
            self.metrics.refused.labels("queue_full").inc()
            raise Unavailable(
                f"{self.waiting} requests are waiting, the queue is full; try again later",
                self.retry_after_s(),
                is_full=True,
            )

    def memory_low(self, rank: int | None = None) -> str | None:
        """Why no engine, or not that of `rank`, has memory for another request; None: one has."""
        return self.replicas.memory_low(self.load, rank)

    def submit(self, submit: Submit, rank: int | None = None) -> OutputStream:
        """Send a request to the replica of `rank`, else to the least loaded, after `check_room`.
        `close` must follow in the end."""
        stream = OutputStream(submit, self._clock(), self._max_buffered)
        stream.waits_for_model = self._unloaded is not None
        if self.state == "unloaded":
            self.is_wanted = True
        self._idle.clear()
        self.metrics.prompt_tokens.inc(len(submit.prompt_ids))
        self.metrics.cache_queries.inc(len(submit.prompt_ids))
        self.metrics.request_prompt.observe(len(submit.prompt_ids))
        self._streams[stream.sent_as] = stream
        if rank is None:
            self._place(stream)
        else:
            self._send_to(stream, rank)
        self._note_queue()
        return stream

    def _place(self, stream: OutputStream) -> None:
        """Send a request to the best replica; it waits while there is none, and fails where none
        that is there could run it."""
        rank = self._best(stream)
        if rank is not None:
            self._send_to(stream, rank)
        elif self.replicas.is_hopeless(stream.submit, stream.bound_to):
            stream.fail(
                "its replica is lost, and no other one has the same weights and room for its tokens"
            )

    def _best(self, stream: OutputStream) -> int | None:
        return self.replicas.choose(stream.submit, self.load, version=stream.bound_to)

    def _send_to(self, stream: OutputStream, rank: int) -> None:
        self._streams.pop(stream.sent_as, None)
        if stream.ranks:
            stream.sent_as = f"{stream.submit.request}~{len(stream.ranks) + 1}"
        self._streams[stream.sent_as] = stream
        stream.rank, stream.version = rank, self.replicas.there[rank].ready.version
        message = stream.rest()
        self.replicas.assign(rank, stream.submit.prompt_ids, stream.tokens[0])
        stream.ranks.append(rank)
        self._send(rank, message)

    def _cancel(self, stream: OutputStream, choice: int | None = None) -> None:
        if stream.rank is not None:
            self._send(stream.rank, Cancel(stream.sent_as, choice))

    def close(self, stream: OutputStream) -> None:
        """The client is gone, or has its whole answer: cancel what still runs."""
        if self._streams.pop(stream.sent_as, None) is None:
            return
        if not stream.has_ended:
            self._cancel(stream)
        for _ in stream.open_choices:
            self.metrics.finished.labels("abort").inc()
        self.metrics.cached_tokens.inc(stream.cached_tokens)
        self.metrics.request_generated.observe(stream.generated_tokens)
        self.metrics.request_seconds.observe(self._clock() - stream.submitted_at)
        self._note_queue()
        if not self._streams:
            self._idle.set()
            self._idle_since_s = self._clock()

    def stop_choice(self, stream: OutputStream, choice: int) -> None:
        """End one choice, because a stop string was found; its later outputs are dropped."""
        if choice in stream.open_choices:
            self._cancel(stream, choice)
            self._end_choice(stream, choice, "stop")

    def retry_after_s(self) -> int:
        """When a request that comes now would find room, by the rate of the last ones."""
        if len(self._ends) < 2:
            return 1
        rate = (len(self._ends) - 1) / max(1e-3, self._clock() - self._ends[0])
        return max(1, min(_MAX_RETRY_S, math.ceil(max(1, self.waiting) / rate)))

    def metrics_text(self) -> bytes:
        """What is measured, for Prometheus."""
        self.metrics.open.set(self.num_requests)
        self.metrics.ready.set(self.state in ANSWERING)
        self.metrics.loaded.set(self.state == "ready")
        self.metrics.memory_low.set(self.memory_low() is not None)
        self.metrics.running.set(self.in_flight - self.waiting)
        self.metrics.waiting.set(self.waiting)
        self.metrics.stats = self.replicas.stats
        self.metrics.note_ranks(range(self.num_replicas), self.replicas.there, self.load)
        return self.metrics.text()

    def cluster(self) -> dict[str, Any]:
        """The state, the load and the stages, for the page."""
        stats = self.replicas.stats.values()
        return {
            "status": self.state,
            "reason": self.reason,
            "running": self.in_flight - self.waiting,
            "waiting": self.waiting,
            "cache_usage": sum(one.cache_usage for one in stats) / max(1, len(stats)),
            "generated_tokens": sum(one.generated_tokens for one in stats),
            "stages": [msgspec.structs.asdict(stage) for stage in self.replicas.stages],
            "replicas": self.replicas.summary(self.load),
        }

    def drain(self) -> None:
        """Take no more requests; those that are there go on."""
        self.state, self.reason = "draining", "the server is being shut down"

    async def wait_idle(self, timeout_s: float) -> bool:
        """Until no request is left; False at the deadline."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def abort(self, reason: str) -> None:
        """End all running requests with an error, and cancel them."""
        for stream in list(self._streams.values()):
            if not stream.has_ended:
                self._cancel(stream)
                stream.fail(reason)

    def _fail(self, reason: str) -> None:
        if self.state != "draining":
            self.state = "failed"
            self.reason = reason
        self._unloaded = None
        self.replicas.there.clear()
        for stream in self._streams.values():
            stream.fail(reason)

    def _unload(self, after_s: float, begin: Callable[[], None]) -> None:
        idle_s = self._clock() - self._idle_since_s
        if self.state == "ready" and not self._streams and idle_s >= after_s:
            self._unloaded = self.replicas.ready
            self.replicas.there.clear()
            self.is_wanted = False
            self._set_unloaded(f"no request came for {after_s / 60:g} min")
            begin()

    def _set_unloaded(self, why: str) -> None:
        self.state, self.reason = "unloaded", f"{why}; the next one loads the model, and waits"

    def _begin_loading(self) -> None:
        if self.state == "unloaded":
            self.state, self.reason = "loading", "the model is being loaded again"

    def _stay_unloaded(self, reason: str) -> None:
        for stream in self._streams.values():
            stream.fail(reason)
        if self.state == "loading":
            self._set_unloaded(reason)

    def _deliver(self, message: FromEngine, rank: int) -> None:
        if isinstance(message, Ready):
            if self.state == "unloaded":
                return  # of a rank that is being stopped
            self._unloaded, self._idle_since_s = None, self._clock()
            old = self.replicas.there.get(rank)
            if old is not None and old.ready.version != message.version:
                self._send(rank, Retire(old.ready.version))  # from here on they are for the new one
            self.replicas.add(rank, message)
            self._place_waiting()
        elif isinstance(message, Recovering):
            self._pause(message)
        elif isinstance(message, StepOutput):
            if message.stats is not None:
                self.replicas.note(rank, message.stats)
            if rank in self.replicas.there and message.tokens:
                self.replicas.there[rank].note_tokens(message.tokens, self._clock())
            outputs: list[Token | Finished | Prefill] = [
                *message.prefill,
                *message.tokens,
                *message.finished,
            ]
            for output in outputs:
                self._route(output)

    def _pause(self, message: Recovering) -> None:
        """No request is taken until Ready; those that run learn of it, and continue then."""
        if self.state == "ready":
            self.state, self.reason = "recovering", f"recovering: {message.reason}"
        for stream in self._streams.values():
            if not stream.has_ended:
                stream.push(message)

    def _vacate(self, rank: int, wait_s: float, then: Callable[[], None]) -> None:
        self.replicas.set_open(rank, is_open=False)
        self._place_waiting("newer weights are being loaded")
        self._move_from(rank, self._clock() + wait_s, then)

    def _move_from(self, rank: int, deadline: float, then: Callable[[], None]) -> None:
        is_late = self._clock() >= deadline
        running = [one for one in self._streams.values() if one.rank == rank and not one.has_ended]
        for stream in running:
            if is_late or not stream.has_begun:
                self._move(stream)
        if self.load[rank]:
            asyncio.get_running_loop().call_later(_LOOK_S, self._move_from, rank, deadline, then)
        else:
            then()

    def _move(self, stream: OutputStream) -> None:
        """To another replica, where one can take it."""
        for finished in stream.completed():
            self._route(finished)
        old, rank = stream.rank, self._best(stream)
        if stream.has_ended or rank is None:
            return
        self._cancel(stream)
        self._send_to(stream, rank)
        self.metrics.moved.inc()
        stream.push(Recovering(f"rank {old} loads newer weights, {_who(rank)}"))

    def _place_waiting(self, reason: str = "") -> None:
        """The replicas have changed: those that wait for one may find one."""
        if self.state != "draining":
            is_ready = self.ready is not None
            self.state, self.reason = ("ready", "") if is_ready else ("starting", reason)
        for stream in list(self._streams.values()):
            if stream.rank is None and not stream.has_ended:
                self._place(stream)
        self._note_queue()

    def _lose(self, rank: int, reason: str) -> None:
        if rank not in self.replicas.there:
            return
        self.replicas.lose(rank)
        self.metrics.lost_replicas.labels(str(rank)).inc()
        lost = [one for one in self._streams.values() if one.rank == rank and not one.has_ended]
        for stream in lost:
            self._cancel(stream)  # one that was frozen gets this when it wakes up
            stream.rank = None
            stream.losses += 1
            for finished in stream.completed():
                self._route(finished)
            if stream.losses >= _MOST_LOSSES and not stream.has_ended:
                stream.fail(f"{stream.losses} replicas were lost while they ran it: {reason}")
        self._place_waiting(f"no replica is there: {reason}")
        for stream in lost:
            if not stream.has_ended:
                self.metrics.moved.inc()
                stream.push(Recovering(f"rank {rank} is lost, {_who(stream.rank)}"))

    def _route(self, output: Token | Finished | Prefill) -> None:
        stream = self._streams.get(output.request)
        if stream is None or stream.has_ended:
            return
        if isinstance(output, Prefill):
            stream.cached_tokens = output.cached_tokens
            stream.push(stream.without_repeats(output))
        elif output.choice in stream.open_choices:
            if isinstance(output, Token):
                stream.tokens[output.choice].append(output.id)
                self._count_token(stream)
            else:
                stream.cached_tokens = max(stream.cached_tokens, output.cached_tokens)
            if not stream.push(output):
                self._cancel(stream)
                stream.fail("the client reads too slowly; the answer was cancelled")
            elif isinstance(output, Finished):
                self._end_choice(stream, output.choice, output.reason)

    def _count_token(self, stream: OutputStream) -> None:
        now = self._clock()
        if stream.first_token_at is None:
            stream.first_token_at = now
            self.metrics.first_token.observe(now - stream.submitted_at)
        elif stream.last_token_at is not None and stream.submit.choices == 1:
            self.metrics.inter_token.observe(now - stream.last_token_at)
        stream.last_token_at = now
        stream.generated_tokens += 1
        self.metrics.generated_tokens.inc()

    def _end_choice(self, stream: OutputStream, choice: int, reason: FinishReason) -> None:
        self.metrics.finished.labels(reason).inc()
        stream.open_choices.discard(choice)
        self._ends.append(self._clock())
        self._note_queue()

    def _note_queue(self) -> None:
        """Those that wait for a slot learn how many are before them, where that has changed."""
        slots = {rank: one.ready.max_running for rank, one in self.replicas.there.items()}
        for stream, before in queued(self._streams.values(), slots):
            if stream.queued != before:
                stream.queued = before
                stream.push(Queued(before))


def _who(rank: int | None) -> str:
    return "waiting for a replica" if rank is None else f"rank {rank} continues"
