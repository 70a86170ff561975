"""An engine that speaks smolrun/serving/messages.py without a model: scripted tokens at a rate.

It runs on a thread of its own, as the driver's thread would: `slots` choices at once, the others
wait in order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from smolrun.serving.frontend import Frontend
from smolrun.serving.messages import (
    Cancel,
    Finished,
    FromEngine,
    Prefill,
    Ready,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
    Token,
)

Script = Callable[[Submit, int], Sequence[int]]


@dataclass
class _Choice:
    submit: Submit
    choice: int
    tokens: Sequence[int]
    next: int = 0


@dataclass
class FakeEngine:
    """`script(submit, choice)` gives the tokens of an answer; one of each running choice comes
    every `step_s`. Ends with "stop" if the script's tokens fit into max_tokens."""

    script: Script
    step_s: float = 0.0
    slots: int = 4
    max_sequence_length: int = 512
    prefill_steps: int = 0
    cached_tokens: int = 0  # of every prompt
    likely: Sequence[int] = range(32, 64)  # beside the token itself
    submitted: list[Submit] = field(default_factory=list)
    cancelled: list[Cancel] = field(default_factory=list)
    generated: int = 0

    def __post_init__(self) -> None:
        self.frontend = Frontend(self.send)
        self._waiting: deque[_Choice] = deque()
        self._running: list[_Choice] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    def start(self) -> None:
        """Say Ready; once the frontend has its loop."""
        self.say_ready()
        self._thread.start()

    def say_ready(self) -> None:
        """As at start, and after every regrouping."""
        size = self.max_sequence_length
        self.frontend.on_message(Ready(size, size * self.slots, self.slots))

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(10)

    @property
    def load(self) -> int:
        """Choices that run or wait."""
        with self._changed:
            return len(self._running) + len(self._waiting)

    def send(self, _: int, message: ToEngine) -> None:
        with self._changed:
            if isinstance(message, Submit):
                self.submitted.append(message)
                self._waiting += [
                    _Choice(message, choice, self.script(message, choice))
                    for choice in range(message.choices)
                ]
            else:
                self.cancelled.append(message)
                self._cancel(message)
            self._changed.notify()

    def _cancel(self, cancel: Cancel) -> None:
        def is_meant(one: _Choice) -> bool:
            return one.submit.request == cancel.request and cancel.choice in (None, one.choice)

        gone = [one for one in (*self._running, *self._waiting) if is_meant(one)]
        self._running = [one for one in self._running if not is_meant(one)]
        self._waiting = deque(one for one in self._waiting if not is_meant(one))
        if gone:
            self._post(
                StepOutput(
                    finished=[Finished(o.submit.request, o.choice, "cancelled") for o in gone]
                )
            )

    def give_up(self, request: str, message: str) -> None:
        """End a request with an error of the engine."""
        self._post(StepOutput(finished=[Finished(request, 0, "error", message=message)]))

    def _post(self, message: FromEngine) -> None:
        self.frontend.on_message(message)

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_over or self._running or self._waiting, timeout=None
                )
                if self._is_over:
                    return
                while self._waiting and len(self._running) < self.slots:
                    one = self._waiting.popleft()
                    one.next = -max(self.prefill_steps, one.submit.echo_logprobs)
                    self._running.append(one)
                self._post(self._step())
            due = max(due + self.step_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def _step(self) -> StepOutput:
        tokens, finished, prefill, left = [], [], [], []
        for one in self._running:
            request = one.submit.request
            if one.next < 0:
                one.next += 1
                prefill.append(self._prefill(one))
                left.append(one)
                continue
            stop_at = next(
                (at for at, id in enumerate(one.tokens) if id in one.submit.stop_ids), None
            )
            if one.next < min(len(one.tokens), one.submit.max_tokens):
                token = one.tokens[one.next]
                one.next += 1
                self.generated += 1
                wanted = one.submit.top_logprobs
                likely = [(token, -0.5), *((id, -1.5) for id in self.likely)]
                top = None if wanted is None else likely[:wanted]
                tokens.append(
                    Token(request, one.choice, token, None if wanted is None else -0.5, top)
                )
            if one.next >= len(one.tokens) or (stop_at is not None and one.next > stop_at):
                finished.append(Finished(request, one.choice, "stop"))
            elif one.next >= one.submit.max_tokens:
                finished.append(Finished(request, one.choice, "length"))
            else:
                left.append(one)
        self._running = left
        stats = Stats(len(left), len(self._waiting), 0.0, 0, self.generated, 0)
        return StepOutput(tokens, finished, prefill, stats)

    def _prefill(self, one: _Choice) -> Prefill:
        size = len(one.submit.prompt_ids)
        top = [(id, -0.25) for id in self.likely][: one.submit.top_logprobs]
        logprobs = [None, *[(-1.0, top)] * (size - 1)] if one.submit.echo_logprobs else None
        return Prefill(one.submit.request, size, size, logprobs, self.cached_tokens)
