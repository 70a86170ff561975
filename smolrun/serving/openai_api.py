"""OpenAI's HTTP API: /v1/chat/completions, /v1/completions, /v1/models.

Source: OpenAI's API reference; for what it leaves open, what vLLM and llama.cpp do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from sse_starlette.sse import EventSourceResponse
from starlette.responses import Response

from smolrun.serving.api_errors import ApiError, json_response
from smolrun.serving.generation import Generation, Piece, Service
from smolrun.serving.protocol import ChatRequest
from smolrun.serving.text import Delta, ThinkingSplitter

KEEP_ALIVE_S = 15
DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = {"cache-control": "no-cache"}


def event(body: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def event_stream(events: AsyncIterator[bytes]) -> Response:
    """Events as they come, with comments while none come; ends by itself when the client leaves."""
    return EventSourceResponse(events, headers=_STREAM_HEADERS, sep="\n", ping=KEEP_ALIVE_S)


async def unless_gone(request: Request, generation: Generation, answer: Any) -> Response:
    """Wait for an answer as a whole; cancel the generation when the client leaves before."""
    with generation:
        working = asyncio.ensure_future(answer)
        watching = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            return await working if working.done() else Response(status_code=499)
        finally:
            working.cancel()
            watching.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def router(service: Service) -> APIRouter:
    """The routes of OpenAI's API."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.frontend.check_room(body.n or 1)
        return await ChatCompletion(service, body, request).response()

    return routes


class ChatCompletion:
    """One request to /v1/chat/completions."""

    def __init__(self, service: Service, body: ChatRequest, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._id = f"chatcmpl-{request.state.request_id}"
        self._splitters: list[ThinkingSplitter] = []

    async def response(self) -> Response:
        """The answer, or its events."""
        service, body = self._service, self._body
        service.check_model(body.model)
        messages = [{"role": m.role, "content": m.text} for m in body.messages]
        ids, is_thinking = await service.encoded(
            sum(len(message["content"]) for message in messages),
            lambda: service.prompts.chat(messages, body.chat_template_kwargs or {}),
            "messages",
        )
        generation = service.begin(
            ids,
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            request_id=self._id,
            param="messages",
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        if service.prompts.thinks:
            self._splitters = [
                ThinkingSplitter(is_thinking=is_thinking) for _ in range(body.n or 1)
            ]
        if body.stream:
            return event_stream(self._events(generation))
        return await unless_gone(self._request, generation, self._whole(generation))

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._service.created,
            "model": self._service.model,
        }

    def _message(self, piece: Piece) -> dict[str, str]:
        """content and reasoning_content that a piece adds."""
        text = piece.delta.text
        if not self._splitters:
            return {"content": text} if text else {}
        splitter = self._splitters[piece.choice]
        thought, said = splitter.push(text)
        if piece.reason:
            last_thought, last_said = splitter.finish()
            thought, said = thought + last_thought, said + last_said
        return {
            key: value
            for key, value in (("reasoning_content", thought), ("content", said))
            if value
        }

    async def _whole(self, generation: Generation) -> Response:
        choices: list[dict[str, Any]] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": {"content": [], "refusal": None} if self._body.logprobs else None,
                "finish_reason": None,
            }
            for index in range(self._body.n or 1)
        ]
        async for piece in generation.pieces():
            choice = choices[piece.choice]
            for key, text in self._message(piece).items():
                choice["message"][key] = choice["message"].get(key, "") + text
            if self._body.logprobs:
                choice["logprobs"]["content"] += self._logprobs(piece.delta)
            choice["finish_reason"] = piece.reason or choice["finish_reason"]
        return json_response(
            self._head("chat.completion") | {"choices": choices, "usage": usage(generation)}
        )

    async def _events(self, generation: Generation) -> AsyncIterator[bytes]:
        head = self._head("chat.completion.chunk")
        wants_usage = self._body.stream_options and self._body.stream_options.include_usage

        def chunk(choice: int, delta: dict[str, Any], logprobs: Any, reason: Any) -> bytes:
            entry = {
                "index": choice,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": reason,
            }
            return event(head | {"choices": [entry]} | ({"usage": None} if wants_usage else {}))

        with generation:
            try:
                for choice in range(self._body.n or 1):
                    yield chunk(choice, {"role": "assistant", "content": ""}, None, None)
                async for piece in generation.pieces():
                    if piece.prefill is not None:
                        yield f": prefill {piece.prefill.done}/{piece.prefill.total}\n\n".encode()
                        continue
                    delta, logprobs = self._message(piece), None
                    if self._body.logprobs and piece.delta.tokens:
                        logprobs = {"content": self._logprobs(piece.delta), "refusal": None}
                    if delta or logprobs:
                        yield chunk(piece.choice, delta, logprobs, None)
                    if piece.reason:
                        yield chunk(piece.choice, {}, None, piece.reason)
                if wants_usage:
                    yield event(head | {"choices": [], "usage": usage(generation)})
            except ApiError as error:
                yield event(error.body)
            yield DONE

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        def entry(data: bytes, logprob: float | None) -> dict[str, Any]:
            return {
                "token": data.decode("utf-8", "replace"),
                "logprob": -9999.0 if logprob is None else logprob,
                "bytes": list(data),
            }

        all_bytes = self._service.prompts.token_bytes
        return [
            entry(token.bytes, token.logprob)
            | {"top_logprobs": [entry(all_bytes[id], value) for id, value in token.top or []]}
            for token in delta.tokens
        ]


def usage(generation: Generation) -> dict[str, Any]:
    """Tokens of the prompt, counted once, and of all answers."""
    counts = generation.usage
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
    }
