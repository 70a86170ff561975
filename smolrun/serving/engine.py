"""Rank 0's loop: schedule, run, postprocess.

    control thread   submit, cancel --+
    I/O thread       results ---------+--> inbox --> this loop --> StepOutput to the driver
                                                      |    ^
                                                      v    |
                                              scheduler, pipeline

The loop blocks on its inbox alone, so an idle server takes no CPU. Knows token ids only, and
nothing of the control protocol: what it has to say goes to a function that it is given.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterator

import msgspec

from smolrun.errors import SmolrunError
from smolrun.serving.batch import BatchResult
from smolrun.serving.messages import (
    Cancel,
    FromEngine,
    Prefill,
    Ready,
    StageStats,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
)
from smolrun.serving.pipeline import PipelineHead
from smolrun.serving.scheduler import Scheduler

_STATS_EVERY_S = 1.0
# So long a chunk of a prompt may take on a stage: running answers wait for it, and so do
# cancellations.
_CHUNK_S = 0.15
_FIRST_CHUNK_TOKENS = 64
_MEASURED_TOKENS = 32  # with fewer, a batch takes its time for other things
_SCORES_A_MESSAGE = 256  # log-probabilities of a prompt: 150 kB with 20 likely tokens each
_STOP, _FINISH = object(), object()
_PIPELINE_ENDED = None
_WARM_UP = Submit(request="warm-up", prompt_ids=[0], max_tokens=2)

Send = Callable[[FromEngine], None]


class Engine:
    """The requests of a server, from submission to their last token. `submit`, `cancel` and `stop`
    are for any thread and do not block; `run` is the loop."""

    def __init__(
        self, scheduler: Scheduler, send: Send, *, max_message_bytes: int, version: int = 0
    ) -> None:
        """`send` may block; a message is at most `max_message_bytes` of JSON. `version` of the
        weights, for Ready."""
        self._scheduler = scheduler
        self._version = version
        self._send = send
        self._max_message_bytes = max_message_bytes
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._stages: list[StageStats] = []
        self._stages_asked_s = self._stats_sent_s = -math.inf
        self._has_news = False  # since statistics were sent
        self._is_stopping = self._is_finishing = False
        scheduler.limit_chunks(_FIRST_CHUNK_TOKENS)
        self._chunk_tokens = float(scheduler.chunk_tokens)
        self._started: dict[int, tuple[int, float]] = {}  # batches in flight: tokens, and when
        self._lost: Scheduler | None = None  # whose stages are lost, with its requests
        self._early: list[object] = []  # requests that came before Ready

    def submit(self, request: ToEngine) -> None:
        """A request or a cancellation."""
        self._inbox.put(request)

    def on_result(self, result: BatchResult | BaseException | None) -> None:
        """For the pipeline: what has come back."""
        self._inbox.put(result)

    def stop(self) -> None:
        """End all requests, then the stages, then `run`."""
        self._inbox.put(_STOP)

    def finish(self) -> None:
        """As `stop`, once the requests that are there have ended."""
        self._inbox.put(_FINISH)

    def run(self, pipeline: PipelineHead) -> None:
        """Send Ready once a token has flowed through all stages, then serve until `stop`. Raises
        PeerLost and GenerationEnded, after which it may run again (`recover`), and SmolrunError if
        the model computes no tokens."""
        self._warm_up(pipeline)
        self._report()  # the figures of the stages, before anything is asked
        has_started = self._scheduler.has_requests
        while not self._is_stopping:
            self._take_events(pipeline, wait=not has_started)
            self._report()
            has_started = self._start_batch(pipeline)
            if self._is_finishing and not self._scheduler.has_requests:
                break
        self._end(pipeline)

    def recover(self, scheduler: Scheduler) -> None:
        """Prepare to run again on other stages, with what has not finished. The mesh of the lost
        ones must be closed."""
        self._report()
        self._lost = self._lost or self._scheduler
        self._scheduler = scheduler
        self._started.clear()
        self._stages, self._stages_asked_s = [], -math.inf
        scheduler.limit_chunks(int(self._chunk_tokens))
        kept = []
        while not self._inbox.empty():
            event = self._inbox.get()
            if not isinstance(event, BatchResult | BaseException) and event is not _PIPELINE_ENDED:
                kept.append(event)
        for event in kept:
            self._inbox.put(event)

    def _warm_up(self, pipeline: PipelineHead) -> None:
        self._scheduler.submit(_WARM_UP)
        while self._scheduler.has_requests:
            self._start_batch(pipeline)
            event = self._next_event(pipeline)
            if isinstance(event, BatchResult | BaseException):
                self._take_event(event)
            else:
                self._early.append(event)
        (finished,) = self._scheduler.take_output().finished
        if finished.reason == "error":
            raise SmolrunError(f"the model computes no tokens: {finished.message}")
        self._scheduler.reset_totals()
        slots = self._scheduler.slots
        cache_tokens, stages = len(slots) * slots.capacity, self._stages
        self._send(Ready(slots.capacity, cache_tokens, len(slots), stages, self._version))
        if self._lost is not None:
            self._scheduler.take_over(self._lost)
            self._lost = None
        early, self._early = self._early, []
        for event in early:
            self._take_event(event)

    def _start_batch(self, pipeline: PipelineHead) -> bool:
        """Start one batch if there is one to run; on one stage it is run."""
        batch = self._scheduler.schedule()
        if batch is None:
            return False
        self._started[batch.number] = (len(batch.token_ids), time.perf_counter())
        # By a clock of its own: `_report`, which comes first, would always have just sent them.
        with_stats = _is_due(self._stages_asked_s)
        if with_stats:
            self._stages_asked_s = time.monotonic()
        pipeline.start(batch, with_stats=with_stats)
        self._has_news = True
        return True

    def _limit_chunks(self, number: int) -> None:
        """Fit the size of chunks to the time that a batch took a stage, each time half of the way.

        It waits for the batches before it, one a stage, so its time is that of the slowest stage as
        many times as there are stages."""
        tokens, began_s = self._started.pop(number)
        if tokens >= _MEASURED_TOKENS:
            seconds = (time.perf_counter() - began_s) / self._scheduler.num_stages
            fitting = tokens * _CHUNK_S / seconds
            self._chunk_tokens += (fitting - self._chunk_tokens) / 2
            self._scheduler.limit_chunks(int(self._chunk_tokens))

    # -- events ----

    def _take_events(self, pipeline: PipelineHead, *, wait: bool) -> None:
        """Every event that is there; waits for the first one if `wait`."""
        if wait:
            self._take_event(self._next_event(pipeline))
        while True:
            try:
                event = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._take_event(event)

    def _next_event(self, pipeline: PipelineHead) -> object:
        began = time.perf_counter()
        event = self._inbox.get()
        if self._scheduler.num_in_flight:
            pipeline.waited(time.perf_counter() - began)
        return event

    def _take_event(self, event: object) -> None:
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Submit):
            self._scheduler.submit(event)
        elif isinstance(event, Cancel):
            self._scheduler.cancel(event)
        elif isinstance(event, BatchResult):
            self._scheduler.update(event)
            self._limit_chunks(event.number)
            self._stages = event.stages or self._stages
        elif event is _STOP:
            self._is_stopping = True
        elif event is _FINISH:
            self._is_finishing = True
        self._has_news = True

    def _end(self, pipeline: PipelineHead) -> None:
        """Cancel what is left, and wait until the last stage has answered that it ends."""
        self._scheduler.cancel_all()
        self._report()
        while self._scheduler.num_in_flight:
            self._take_event(self._next_event(pipeline))
        pipeline.stop()
        while (event := self._inbox.get()) is not _PIPELINE_ENDED:
            self._take_event(event)
        self._scheduler.cancel_all()  # requests that came meanwhile
        self._report()

    # -- reports ----

    def _report(self) -> None:
        """Send what has happened; with statistics about once a second, and when all is done."""
        output = self._scheduler.take_output()
        is_idle = not self._scheduler.has_requests
        if self._has_news and (is_idle or _is_due(self._stats_sent_s)):
            stats = msgspec.structs.replace(self._scheduler.stats(), stages=self._stages)
            output = msgspec.structs.replace(output, stats=stats)
            self._stats_sent_s, self._has_news = time.monotonic(), False
        for part in split_output(output, self._max_message_bytes):
            self._send(part)


def _is_due(last_s: float) -> bool:
    return time.monotonic() - last_s >= _STATS_EVERY_S


def split_output(output: StepOutput, max_bytes: int) -> Iterator[StepOutput]:
    """Messages of at most `max_bytes` of JSON that say the same in the same order; none if there is
    nothing to say."""
    if output == StepOutput():
        return
    items: list[tuple[str, msgspec.Struct | Stats]] = [
        *(("prefill", part) for item in output.prefill for part in _split_prefill(item)),
        *(("tokens", item) for item in output.tokens),
        *(("finished", item) for item in output.finished),
    ]
    if len(items) < 2 or len(msgspec.json.encode(output)) <= max_bytes:
        yield output
        return
    for half in (items[: len(items) // 2], items[len(items) // 2 :]):
        lists = {
            name: [item for kind, item in half if kind == name]
            for name in ("prefill", "tokens", "finished")
        }
        yield from split_output(msgspec.convert(lists, StepOutput, from_attributes=True), max_bytes)
    if output.stats is not None:
        yield StepOutput(stats=output.stats)


def _split_prefill(prefill: Prefill) -> list[Prefill]:
    scores, size = prefill.logprobs, _SCORES_A_MESSAGE
    if not scores:
        return [prefill]
    starts = range(0, len(scores), size)
    return [msgspec.structs.replace(prefill, logprobs=scores[at : at + size]) for at in starts]
