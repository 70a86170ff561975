"""The bridge between the HTTP server's event loop and the engine on rank 0.

    HTTP thread                                              driver's thread
      submit() -> OutputStream  -- send(Submit), any thread -->    rank 0
      async for output    <-- call_soon_threadsafe ------    on_message(StepOutput)

Everything but `on_message` and `fail` runs on the event loop. Requests that wait are counted and
bounded here, so that a refusal takes no work; a stream whose reader is slow has a bounded buffer.
Knows nothing of HTTP, text or sockets.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from smolrun.serving.http_metrics import ServingMetrics
from smolrun.serving.messages import (
    Cancel,
    Finished,
    FinishReason,
    FromEngine,
    Prefill,
    Ready,
    Recovering,
    StepOutput,
    Submit,
    ToEngine,
    Token,
)

Output = Token | Finished | Prefill | Recovering
State = Literal["starting", "ready", "recovering", "draining", "failed"]

_RATE_WINDOW = 32  # finished choices that the rate is measured over
_MAX_RETRY_S = 60


class Unavailable(Exception):
    """The engine takes no request now. `retry_after_s`: when to try again, in whole seconds;
    `is_full`: too many are waiting, otherwise it is not ready or is being shut down."""

    def __init__(self, message: str, retry_after_s: int, *, is_full: bool = False) -> None:
        self.retry_after_s = retry_after_s
        self.is_full = is_full
        super().__init__(message)


class StreamFailed(Exception):
    """A request ended before its last token; the text is for the client."""


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
        self.open_choices = set(range(submit.choices))
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


class Frontend:
    """Requests of all clients. `send` takes a message for rank 0 from any thread and never blocks.

    At most `max_waiting` choices wait beside those that the engine runs at once.
    """

    def __init__(
        self,
        send: Callable[[ToEngine], None],
        *,
        max_waiting: int = 64,
        max_buffered: int = 8192,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._max_waiting = max_waiting
        self._max_buffered = max_buffered
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, OutputStream] = {}
        self._ends: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._idle = asyncio.Event()
        self._idle.set()
        self.state: State = "starting"
        self.reason = "the model is being loaded"
        self.ready: Ready | None = None
        self.metrics = ServingMetrics()

    # --- the driver's thread ---------------------------------------------------------------------

    def on_message(self, message: FromEngine) -> None:
        """A message of rank 0; from any thread, never blocks."""
        self._call(self._deliver, message)

    def fail(self, reason: str) -> None:
        """The engine is lost: every running request ends with an error; from any thread."""
        self._call(self._fail, reason)

    def _call(self, function: Callable[..., None], argument: object) -> None:
        loop = self._loop
        if loop is None:
            raise RuntimeError("the HTTP server has not been started")
        try:
            loop.call_soon_threadsafe(function, argument)
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
    def waiting(self) -> int:
        """Choices beyond those that the engine can run at once."""
        return max(0, self.in_flight - (self.ready.max_running if self.ready else 0))

    def check_room(self, choices: int = 1) -> None:
        """Raises Unavailable where there is no room for a request; for no choices only where the
        engine is not ready."""
        if self.state != "ready" or self.ready is None:
            self.metrics.refused.labels("not_ready").inc()
            raise Unavailable(self.reason, 1 if self.state == "draining" else 5)
        # A single request may be larger than the queue when nothing else is there.
        most = self.ready.max_running + self._max_waiting
        if choices and self._streams and self.in_flight + choices > most:
            self.metrics.refused.labels("queue_full").inc()
            raise Unavailable(
                f"{self.waiting} requests are waiting, the queue is full; try again later",
                self.retry_after_s(),
                is_full=True,
            )

    def submit(self, submit: Submit) -> OutputStream:
        """Send a request to the engine, after `check_room`. `close` must follow in the end."""
        stream = OutputStream(submit, self._clock(), self._max_buffered)
        self._streams[submit.request] = stream
        self._idle.clear()
        self.metrics.prompt_tokens.inc(len(submit.prompt_ids))
        self.metrics.cache_queries.inc(len(submit.prompt_ids))
        self.metrics.request_prompt.observe(len(submit.prompt_ids))
        self._send(submit)
        return stream

    def close(self, stream: OutputStream) -> None:
        """The client is gone, or has its whole answer: cancel what still runs."""
        request = stream.submit.request
        if self._streams.pop(request, None) is None:
            return
        if not stream.has_ended:
            self._send(Cancel(request))
        for _ in stream.open_choices:
            self.metrics.finished.labels("abort").inc()
        self.metrics.cached_tokens.inc(stream.cached_tokens)
        self.metrics.request_generated.observe(stream.generated_tokens)
        self.metrics.request_seconds.observe(self._clock() - stream.submitted_at)
        if not self._streams:
            self._idle.set()

    def stop_choice(self, stream: OutputStream, choice: int) -> None:
        """End one choice, because a stop string was found; its later outputs are dropped."""
        if choice in stream.open_choices:
            self._send(Cancel(stream.submit.request, choice))
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
        self.metrics.ready.set(self.state == "ready")
        self.metrics.running.set(self.in_flight - self.waiting)
        self.metrics.waiting.set(self.waiting)
        return self.metrics.text()

    def cluster(self) -> dict[str, Any]:
        """The state, the load and the stages, for the page."""
        stats, ready = self.metrics.stats, self.ready
        stages = stats.stages if stats and stats.stages else ready.stages if ready else []
        return {
            "status": self.state,
            "reason": self.reason,
            "running": self.in_flight - self.waiting,
            "waiting": self.waiting,
            "cache_usage": stats.cache_usage if stats else 0.0,
            "generated_tokens": stats.generated_tokens if stats else 0,
            "stages": [msgspec.structs.asdict(stage) for stage in stages],
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
                self._send(Cancel(stream.submit.request))
                stream.fail(reason)

    def _fail(self, reason: str) -> None:
        if self.state != "draining":
            self.state = "failed"
            self.reason = reason
        for stream in self._streams.values():
            stream.fail(reason)

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            self.ready = message
            if self.state != "draining":
                self.state, self.reason = "ready", ""
        elif isinstance(message, Recovering):
            self._pause(message)
        elif isinstance(message, StepOutput):
            self.metrics.stats = message.stats or self.metrics.stats
            outputs: list[Token | Finished | Prefill] = [
                *message.prefill,
                *message.tokens,
                *message.finished,
            ]
            for output in outputs:
                self._route(output)

    def _pause(self, message: Recovering) -> None:
        """No request is taken until Ready; those that run are told, and go on then."""
        if self.state == "ready":
            self.state, self.reason = "recovering", f"recovering: {message.reason}"
        for stream in self._streams.values():
            if not stream.has_ended:
                stream.push(message)

    def _route(self, output: Token | Finished | Prefill) -> None:
        stream = self._streams.get(output.request)
        if stream is None or stream.has_ended:
            return
        if isinstance(output, Prefill):
            stream.cached_tokens = output.cached_tokens
            stream.push(output)
        elif output.choice in stream.open_choices:
            if isinstance(output, Token):
                self._count_token(stream)
            else:
                stream.cached_tokens = max(stream.cached_tokens, output.cached_tokens)
            if not stream.push(output):
                self._send(Cancel(output.request))
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
