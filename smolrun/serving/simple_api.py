"""The HTTP API of the system that smolrun descends from: /chat, /query, /config, /health.

/chat streams `{"token", "done"}` and ends with the whole text and its times; /query gives them at
once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from smolrun.serving.api_errors import ERRORS, ApiError, json_response
from smolrun.serving.generation import Generation, Service
from smolrun.serving.protocol import CompletionFields, SimpleRequest
from smolrun.serving.responses import (
    LOADING,
    EventStream,
    comments,
    event,
    origin_headers,
    unless_gone,
)


def simple_routes(service: Service) -> APIRouter:
    """The routes of one served model."""
    routes = APIRouter(tags=["simple"])

    @routes.post("/chat", responses=ERRORS, response_class=Response)
    async def chat(body: SimpleRequest, request: Request) -> Response:
        """Answer a text by server-sent events, one for each piece of the answer."""
        generation = await _begin(service, body, request)
        return EventStream([generation], _events(generation))

    @routes.post("/query", responses=ERRORS, response_class=Response)
    async def query(body: SimpleRequest, request: Request) -> Response:
        """Answer a text."""
        generation = await _begin(service, body, request)
        return await unless_gone(request, [generation], _whole(generation))

    @routes.get("/config", responses=ERRORS, response_class=Response)
    async def config() -> Response:
        """What is served, and the values that hold where a request gives none."""
        return json_response(_config(service))

    @routes.get("/health", response_class=Response)
    async def health() -> Response:
        """Whether requests can be answered; always 200, see /readyz."""
        is_ready = service.frontend.state == "ready"
        status = "connected" if is_ready else "disconnected"
        return json_response({"status": status, "healthy": is_ready})

    return routes


async def _begin(service: Service, body: SimpleRequest, request: Request) -> Generation:
    service.check(service.model, 1, body.worker_rank)
    messages = [{"role": "user", "content": body.text}]
    ids, _ = await service.encoded(
        len(body.text), lambda: service.prompts.chat(messages, {}), "text"
    )
    fields = CompletionFields(**body.model_dump())  # those that it knows
    if body.decoding_strategy == "greedy":
        fields.temperature = 0
    (generation,) = service.begin(
        [ids],
        fields,
        max_tokens=body.max_tokens,
        request_id=request.state.request_id,
        param="text",
    )
    return generation


async def _events(generation: Generation) -> AsyncIterator[bytes]:
    texts: list[str] = []
    try:
        if generation.stream.waits_for_model:
            yield LOADING
        async for piece in generation.pieces():
            for comment in comments(piece):
                yield comment
            if piece.delta.text:
                texts.append(piece.delta.text)
                yield event({"token": piece.delta.text, "done": False})
        yield event({"token": "", "done": True, "full_text": "".join(texts)} | _times(generation))
    except ApiError as error:
        yield event({"error": error.message, "done": True})


async def _whole(generation: Generation) -> Response:
    texts = [piece.delta.text async for piece in generation.pieces()]
    return json_response(
        {"generated_text": "".join(texts), "success": True, "error": None} | _times(generation),
        headers=origin_headers([generation]),
    )


def _times(generation: Generation) -> dict[str, Any]:
    """Of a generation that has ended, in milliseconds."""
    stream, count = generation.stream, generation.usage.completion_tokens
    total_s = stream.elapsed_s()
    return {
        "total_time_ms": round(1000 * total_s, 3),
        "time_to_first_token_ms": None
        if stream.first_token_at is None
        else round(1000 * (stream.first_token_at - stream.submitted_at), 3),
        "tokens_per_second": round(count / total_s, 3) if total_s else None,
        "num_tokens": count,
        "worker_rank": stream.ranks[-1] if stream.ranks else None,
        **({"step": generation.step} if generation.step else {}),
    }


def _config(service: Service) -> dict[str, Any]:
    ready = service.frontend.ready
    defaults = service.defaults
    return {
        "model_name": service.model,
        "max_new_tokens": service.default_max_tokens,
        "max_sequence_length": ready.max_sequence_length if ready else None,
        "decoding_strategy": "greedy" if defaults.temperature == 0 else "sampling",
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
        "answers_chats": not service.continues_text,
        "thinks": service.prompts.thinks,
        "history": "server" if service.history else "browser",
        "compare_with": service.compare_with,
        "num_replicas": service.frontend.num_replicas,
    }
