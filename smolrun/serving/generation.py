"""One request from its checks to its pieces of text, alike for every HTTP API.

    Service.begin(prompt, ...) -> Generation -> async for Piece(choice, delta, finish_reason)

Knows the frontend and the tokenizer; knows nothing of HTTP but the errors that it raises.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from smolrun.errors import DataError
from smolrun.models.sampling import Sampling
from smolrun.serving.api_errors import ApiError
from smolrun.serving.frontend import Frontend
from smolrun.serving.messages import Finished, FinishReason, Prefill, Recovering, Submit
from smolrun.serving.output_stream import OutputStream, Queued, StreamFailed
from smolrun.serving.protocol import CompletionFields
from smolrun.serving.text import AnswerText, Delta, Prompts

T = TypeVar("T")

# More characters than these cannot be few enough tokens, so they are not encoded to find out.
_CHARACTERS_PER_TOKEN = 64
_ENCODED_HERE = 2000  # characters
_SAMPLING_KEYS = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True)
class Piece:
    """What is new of one choice; `reason` with its last piece. Without a choice: how many
    are before it in the queue, the progress of the prompt, or that the answer pauses, and why."""

    choice: int
    delta: Delta
    reason: FinishReason | None = None
    prefill: Prefill | None = None
    recovering: str | None = None
    queued: int | None = None

    @property
    def is_progress(self) -> bool:
        """Whether nothing of any choice is in it."""
        return not (self.prefill is None and self.recovering is None and self.queued is None)


@dataclass
class Usage:
    """Tokens of a request: the prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Service:
    """The served model and all that requests need. `continues_text`: it has no chat template.
    `history`: the folder of conversations, where the server keeps them.
    `compare_with`: other servers that the page may ask."""

    model: str
    prompts: Prompts
    frontend: Frontend
    stop_ids: Sequence[int]
    defaults: Sampling = field(default_factory=Sampling)
    default_max_tokens: int = 1024
    request_timeout_s: float = 600.0
    history: Path | None = None
    compare_with: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    _tokenizer: threading.Lock = field(default_factory=threading.Lock)  # for one thread at a time
    _encoder: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="smolrun-prompts")
    )

    @property
    def continues_text(self) -> bool:
        """Whether it is a base model, which continues a text where others answer."""
        return self.prompts.template is None

    def close(self) -> None:
        """End the thread that encodes prompts."""
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def check(self, model: str | None, choices: int, rank: int | None = None) -> None:
        """Before any work: 404 for any other model, where one is named, 400 for a rank that does
        not exist; raises Unavailable where there is no room."""
        if model:
            self.check_model(model)
        if rank is not None and rank >= self.frontend.num_replicas:
            message = f"worker_rank: {rank} is none of the {self.frontend.num_replicas} replicas"
            raise ApiError(400, message, param="worker_rank", code="invalid_value")
        self.frontend.check_room(choices, rank)

    def check_model(self, name: str) -> None:
        """404 for any other model."""
        if name != self.model:
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )

    async def encoded(self, num_characters: int, encode: Callable[[], T], param: str) -> T:
        """`encode()`, alone with the tokenizer; 400 for what it refuses or is surely too long."""
        most = self.context * _CHARACTERS_PER_TOKEN
        if num_characters > most:
            raise self._too_long(f"{num_characters:,} characters", param)
        try:
            # A short prompt takes less time than a change of threads; a long one would hold all
            # other requests.
            if num_characters <= _ENCODED_HERE and self._tokenizer.acquire(blocking=False):
                try:
                    return encode()
                finally:
                    self._tokenizer.release()
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._encoder, self._locked, encode)
        except DataError as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from None

    def _locked(self, encode: Callable[[], T]) -> T:
        with self._tokenizer:
            return encode()

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""
        self.frontend.check_room(0)
        ready = self.frontend.ready
        assert ready is not None
        return min(ready.max_sequence_length, ready.cache_tokens)

    def _too_long(self, what: str, param: str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {what}; the context of {self.model} is {self.context} tokens, of "
            "which the answer needs at least one; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )

    def begin(
        self,
        prompts: list[list[int]],
        request: CompletionFields,
        *,
        max_tokens: int | None,
        request_id: str,
        param: str,
        top_logprobs: int | None = None,
        echo_logprobs: bool = False,
        stops: Sequence[str] = (),
        grammar: str = "",
    ) -> list[Generation]:
        """Submit one request to the engine for each prompt, all of them or none. `stops`: stop
        strings beside those of the request; `grammar`: as of Sampling. 400 for a prompt that is too
        long; raises Unavailable."""
        choices, stop_ids = request.n or 1, self._stop_ids(request)
        submits = [
            Submit(
                request=f"{request_id[:80]}-{secrets.token_hex(4)}",
                prompt_ids=ids,
                max_tokens=min(max_tokens or self.default_max_tokens, self._room(ids, param)),
                choices=choices,
                sampling=self._sampling(request, grammar),
                stop_ids=stop_ids,
                top_logprobs=top_logprobs,
                echo_logprobs=echo_logprobs,
            )
            for ids in prompts
        ]
        rank = request.worker_rank
        self.frontend.check_room(choices * len(prompts), rank)
        return [Generation(self, submit, [*request.stops, *stops], rank) for submit in submits]

    def _room(self, prompt_ids: list[int], param: str) -> int:
        """For the tokens of an answer."""
        room = self.context - len(prompt_ids)
        if room < 1:
            raise self._too_long(f"{len(prompt_ids)} tokens", param)
        return room

    def _stop_ids(self, request: CompletionFields) -> list[int]:
        given = request.stop_token_ids or []
        return sorted({*given, *([] if request.ignore_eos else self.stop_ids)})

    def _sampling(self, request: CompletionFields, grammar: str) -> Sampling:
        given = {key: getattr(request, key) for key in _SAMPLING_KEYS}
        values = {key: value for key, value in given.items() if value is not None}
        if values.get("top_k") == -1:
            values["top_k"] = 0
        bias = request.logit_bias or {}
        outside = [key for key in bias if int(key) >= self.prompts.tokenizer.vocab_size]
        if outside:
            message = f"logit_bias: the model has no token {outside[0]}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        seed = secrets.randbits(31) if request.seed is None else request.seed
        return msgspec.structs.replace(
            self.defaults,
            **values,
            logit_bias={int(key): float(value) for key, value in bias.items()},
            seed=seed,
            grammar=grammar,
        )


class Generation:
    """A running request, until it is closed."""

    def __init__(
        self, service: Service, submit: Submit, stops: list[str], rank: int | None = None
    ) -> None:
        self._service = service
        self._answers = [
            AnswerText(service.prompts.token_bytes, stops, submit.stop_ids)
            for _ in range(submit.choices)
        ]
        self.usage = Usage(len(submit.prompt_ids))
        self.stream: OutputStream = service.frontend.submit(submit, rank)

    @property
    def replicas(self) -> list[int]:
        """The ranks that have answered so far, in order; none where there is one engine, whose
        rank has a part of the model only."""
        return self.stream.ranks if self._service.frontend.num_replicas > 1 else []

    @property
    def step(self) -> int | None:
        """Of the checkpoint whose weights answer; None where they are of none."""
        return self.stream.version or None

    def close(self) -> None:
        """Cancel what still runs."""
        self._service.frontend.close(self.stream)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until every choice has ended; ApiError where the engine fails or the deadline passes."""
        deadline = asyncio.get_running_loop().time() + self._service.request_timeout_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    output = await anext(self.stream)
            except StopAsyncIteration:
                return
            except StreamFailed as error:
                raise ApiError(503, str(error), code="engine_failed") from None
            except TimeoutError:
                seconds = self._service.request_timeout_s
                message = f"the request took longer than {seconds:g} s and was cancelled"
                raise ApiError(504, message, code="deadline_exceeded") from None
            if isinstance(output, Prefill):
                self.usage.cached_tokens = output.cached_tokens
                yield Piece(0, Delta(), prefill=output)
                continue
            if isinstance(output, Recovering):
                yield Piece(0, Delta(), recovering=output.reason)
                continue
            if isinstance(output, Queued):
                yield Piece(0, Delta(), queued=output.before)
                continue
            answer = self._answers[output.choice]
            if answer.is_stopped():
                continue
            if isinstance(output, Finished):
                yield self._finished(output, answer)
                continue
            self.usage.completion_tokens += 1
            delta = answer.push(output.id, output.logprob, output.top)
            if answer.is_stopped():
                self._service.frontend.stop_choice(self.stream, output.choice)
            reason: FinishReason | None = "stop" if answer.is_stopped() else None
            if delta.text or delta.tokens or reason:
                yield Piece(output.choice, delta, reason)

    def _finished(self, output: Finished, answer: AnswerText) -> Piece:
        self.usage.cached_tokens = max(self.usage.cached_tokens, output.cached_tokens)
        if output.reason in ("error", "cancelled"):
            message = output.message or f"the engine ended the request: {output.reason}"
            raise ApiError(503, message, code="engine_failed")
        return Piece(output.choice, answer.finish(), output.reason)


async def merged(generations: list[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of all generations as they come, each with the number of its prompt."""
    if len(generations) == 1:  # as almost always, and without a task for each piece
        async for piece in generations[0].pieces():
            yield 0, piece
        return
    next_pieces = {
        asyncio.ensure_future(anext(pieces)): (number, pieces)
        for number, pieces in enumerate(one.pieces() for one in generations)
    }
    try:
        while next_pieces:
            done, _ = await asyncio.wait(next_pieces, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, pieces = next_pieces.pop(task)
                try:
                    piece = task.result()
                except StopAsyncIteration:
                    continue
                next_pieces[asyncio.ensure_future(anext(pieces))] = number, pieces
                yield number, piece
    finally:
        for task in next_pieces:
            task.cancel()
