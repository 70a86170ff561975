"""The routes of OpenAI's HTTP API, and what of it is not there, refused by name.

Source: OpenAI's API reference; for what it leaves open, what vLLM and llama.cpp do.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from smolrun.serving.api_errors import ERRORS, ApiError, json_response
from smolrun.serving.chat_completions import ChatCompletion
from smolrun.serving.generation import Service
from smolrun.serving.protocol import ChatRequest, CompletionRequest, ResponsesRequest
from smolrun.serving.responses_api import KeptResponses, ModelResponse, client_key
from smolrun.serving.resumable_streams import KeptStreams, StreamId
from smolrun.serving.text_completions import TextCompletion

_NOT_THERE = (
    *("embeddings", "moderations", "images/generations", "images/edits"),
    *("audio/speech", "audio/transcriptions", "rerank", "batches", "files"),
)


def openai_routes(service: Service, streams: KeptStreams) -> APIRouter:
    """The routes of one served model."""
    routes = APIRouter(tags=["OpenAI"], responses=ERRORS)

    @routes.post("/v1/chat/completions", response_class=Response)
    async def chat_completions(
        body: ChatRequest, request: Request, x_smolrun_stream: StreamId = None
    ) -> Response:
        """Answer a conversation; `stream=true` sends the answer as server-sent events."""
        completion = ChatCompletion(service, body, request)
        return await streams.response(completion, request, x_smolrun_stream)

    @routes.post("/v1/completions", response_class=Response)
    async def completions(
        body: CompletionRequest, request: Request, x_smolrun_stream: StreamId = None
    ) -> Response:
        """Continue a text; `stream=true` sends the continuation as server-sent events."""
        completion = TextCompletion(service, body, request)
        return await streams.response(completion, request, x_smolrun_stream)

    _add_responses(routes, service, streams)

    @routes.get("/v1/models", response_class=Response)
    async def models() -> Response:
        """The served model."""
        return json_response({"object": "list", "data": [_model(service)]})

    @routes.get("/v1/models/{model:path}", response_class=Response)
    async def model(model: str) -> Response:
        """The served model, by its name."""
        service.check_model(model)
        return json_response(_model(service))

    async def not_there(request: Request) -> Response:
        name = request.url.path.removeprefix("/v1/")
        message = f"{name} is not supported by this server; chat/completions, responses and "
        message += "completions are"
        raise ApiError(404, message, code="unsupported_endpoint")

    for name in _NOT_THERE:
        routes.add_api_route(f"/v1/{name}", not_there, methods=["POST"], include_in_schema=False)
    return routes


def _add_responses(routes: APIRouter, service: Service, streams: KeptStreams) -> None:
    kept = KeptResponses()

    @routes.post("/v1/responses", response_class=Response)
    async def responses(
        body: ResponsesRequest, request: Request, x_smolrun_stream: StreamId = None
    ) -> Response:
        """Answer a conversation in OpenAI's newer shapes; `stream=true` sends events."""
        answer = ModelResponse(service, body, request, kept)
        return await streams.response(answer, request, x_smolrun_stream)

    @routes.get("/v1/responses/{id}", response_class=Response)
    async def response(id: str, request: Request) -> Response:
        """A response that is kept in memory."""
        return json_response(kept.find(client_key(request), id).body)

    @routes.delete("/v1/responses/{id}", response_class=Response)
    async def forget(id: str, request: Request) -> Response:
        """Forget a response, and the items that only it has."""
        kept.forget(client_key(request), id)
        return json_response({"id": id, "object": "response", "deleted": True})


def _model(service: Service) -> dict[str, Any]:
    ready = service.frontend.ready
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "smolrun",
        "max_model_len": ready.max_sequence_length if ready else None,  # as vLLM calls it
    }
