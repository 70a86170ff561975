"""POST /v1/completions: texts or token ids in, their continuations out, in OpenAI's older shapes.

Several prompts are one request each for the engine; a choice has the number
`prompt * n + choice`.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from smolrun.serving.api_errors import ApiError, json_response
from smolrun.serving.generation import Generation, Piece, Service, Usage
from smolrun.serving.protocol import CompletionRequest
from smolrun.serving.responses import (
    DONE,
    EventStream,
    event,
    prefill_comment,
    unless_gone,
    usage_json,
)
from smolrun.serving.text import Delta, TokenText

_DEFAULT_MAX_TOKENS = 16  # of OpenAI's API


@dataclass
class _Echo:
    """A prompt that is to be repeated; its log-probabilities come in parts, before any token."""

    text: str
    ids: list[int]
    logprobs: list[float | None] = field(default_factory=list)
    is_sent: set[int] = field(default_factory=set)


class TextCompletion:
    """One request."""

    def __init__(self, service: Service, body: CompletionRequest, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._n = body.n or 1
        self._echoes: list[_Echo] = []
        self._offsets: dict[int, int] = {}  # choice -> characters so far
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._head: dict[str, Any] = {
            "id": f"cmpl-{request.state.request_id}",
            "object": "text_completion",
            "created": service.now(),
            "model": service.model,
        }

    async def response(self) -> Response:
        """The answer or its events; raises ApiError and Unavailable before anything is sent."""
        body = self._body
        prompts = _prompts(body.prompt)
        self._service.check(body.model, self._n * len(prompts))
        _check_supported(body)
        encoded = [await self._encoded(prompt) for prompt in prompts]
        self._service.frontend.check_room(self._n * len(prompts))  # for all of them or none
        generations: list[Generation] = []
        try:
            generations.extend(self._begin(ids) for ids in encoded)
        except BaseException:
            for generation in generations:
                generation.close()
            raise
        if body.stream:
            return EventStream(generations, self._events(generations))
        return await unless_gone(self._request, generations, self._whole(generations))

    async def _encoded(self, prompt: str | list[int]) -> list[int]:
        prompts = self._service.prompts
        if isinstance(prompt, str):
            text = prompt
            ids = await self._service.encoded(len(text), lambda: prompts.text(text), "prompt")
        else:
            ids = prompt
            outside = [id for id in ids if id >= prompts.tokenizer.vocab_size]
            if outside:
                message = f"prompt: the model has no token {outside[0]}"
                raise ApiError(400, message, param="prompt", code="invalid_value")
            data = b"".join(prompts.token_bytes[id] for id in ids)
            text = data.decode("utf-8", "replace")
        if self._body.echo:
            self._echoes.append(_Echo(text, ids))
        return ids

    def _begin(self, ids: list[int]) -> Generation:
        body = self._body
        return self._service.begin(
            ids,
            body,
            max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
            request_id=self._request.state.request_id,
            param="prompt",
            top_logprobs=body.logprobs,
            echo_logprobs=bool(body.echo) and body.logprobs is not None,
            has_room=True,
        )

    def _delta(self, prompt: int, piece: Piece) -> Delta:
        """With the prompt before the first piece of a choice, if it is to be repeated."""
        if not self._echoes or piece.choice in self._echoes[prompt].is_sent:
            return piece.delta
        echo = self._echoes[prompt]
        echo.is_sent.add(piece.choice)
        logprobs = [*echo.logprobs, *[None] * len(echo.ids)]
        every = self._service.prompts.token_bytes
        tokens = [
            TokenText(id, every[id], logprob, None if logprob is None else [(id, logprob)])
            for id, logprob in zip(echo.ids, logprobs, strict=False)
        ]
        return Delta(echo.text + piece.delta.text, [*tokens, *piece.delta.tokens])

    def _choice(self, prompt: int, piece: Piece) -> dict[str, Any]:
        number = prompt * self._n + piece.choice
        delta = self._delta(prompt, piece)
        logprobs = None if self._body.logprobs is None else self._logprobs(number, delta)
        return {
            "index": number,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": piece.reason,
        }

    def _logprobs(self, number: int, delta: Delta) -> dict[str, Any]:
        every = self._service.prompts.token_bytes
        offset, offsets = self._offsets.get(number, 0), []
        # A character that several tokens make up counts once, as in the text.
        decoder = self._decoders.setdefault(
            number, codecs.getincrementaldecoder("utf-8")("replace")
        )
        for token in delta.tokens:
            offsets.append(offset)
            offset += len(decoder.decode(token.bytes))
        self._offsets[number] = offset
        return {
            "tokens": [token.text for token in delta.tokens],
            "token_logprobs": [token.logprob for token in delta.tokens],
            "top_logprobs": [
                None
                if token.top is None
                else {every[id].decode("utf-8", "replace"): value for id, value in token.top}
                for token in delta.tokens
            ],
            "text_offset": offsets,
        }

    def _heard(self, prompt: int, piece: Piece) -> None:
        if self._echoes and piece.prefill is not None and piece.prefill.logprobs:
            self._echoes[prompt].logprobs += piece.prefill.logprobs

    async def _whole(self, generations: list[Generation]) -> Response:
        choices: dict[int, dict[str, Any]] = {}
        async for prompt, piece in merged(generations):
            if piece.prefill is not None:
                self._heard(prompt, piece)
                continue
            new = self._choice(prompt, piece)
            known = choices.setdefault(new["index"], new)
            if known is not new:
                known["text"] += new["text"]
                known["finish_reason"] = new["finish_reason"]
                for key, values in (new["logprobs"] or {}).items():
                    known["logprobs"][key] += values
        answer = {"choices": [choices[index] for index in sorted(choices)]}
        return json_response(self._head | answer | {"usage": usage_json(_sum(generations))})

    async def _events(self, generations: list[Generation]) -> AsyncIterator[bytes]:
        wants_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        last = {"usage": None} if wants_usage else {}
        try:
            async for prompt, piece in merged(generations):
                if piece.prefill is not None:
                    self._heard(prompt, piece)
                    yield prefill_comment(piece)
                    continue
                yield event(self._head | {"choices": [self._choice(prompt, piece)]} | last)
            if wants_usage:
                usage = usage_json(_sum(generations))
                yield event(self._head | {"choices": [], "usage": usage})
        except ApiError as error:
            yield event(error.body)
        yield DONE


async def merged(generations: list[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of all generations as they come, each with the number of its prompt."""
    pieces: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue(1)

    async def forward(number: int, generation: Generation) -> None:
        try:
            async for piece in generation.pieces():
                await pieces.put((number, piece))
            await pieces.put(None)
        except Exception as error:  # of a defect as well, or else the client would wait forever
            await pieces.put(error)

    tasks = [asyncio.ensure_future(forward(i, one)) for i, one in enumerate(generations)]
    try:
        left = len(tasks)
        while left:
            item = await pieces.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


def _sum(generations: list[Generation]) -> Usage:
    return Usage(
        sum(one.usage.prompt_tokens for one in generations),
        sum(one.usage.completion_tokens for one in generations),
        sum(one.usage.cached_tokens for one in generations),
    )


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One entry a prompt, of what a request may give as one."""
    if isinstance(given, str):
        return [given]
    prompts: list[str | list[int]] = []
    numbers: list[int] = []
    for item in given:
        if isinstance(item, int):
            numbers.append(item)
        else:
            prompts.append(item)
    return [numbers] if numbers else prompts


def _check_supported(body: CompletionRequest) -> None:
    refused = {
        "suffix": bool(body.suffix),
        "best_of": body.best_of is not None and body.best_of != (body.n or 1),
    }
    for name, is_refused in refused.items():
        if is_refused:
            message = f"{name} is not supported by this server; leave it out"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
