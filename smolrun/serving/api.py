"""The HTTP application of one served model: all routes, errors, and what guards them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from smolrun.serving import api_errors, api_reference
from smolrun.serving.access import AccessControl, AccessPolicy
from smolrun.serving.api_errors import ERRORS, json_response
from smolrun.serving.conversations import conversation_routes
from smolrun.serving.frontend import ANSWERING
from smolrun.serving.generation import Service
from smolrun.serving.http_metrics import CONTENT_TYPE
from smolrun.serving.openai_api import openai_routes
from smolrun.serving.page import add_page
from smolrun.serving.resumable_streams import KeptStreams, stream_routes
from smolrun.serving.simple_api import simple_routes

_REFERENCE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
}


def build_app(service: Service, policy: AccessPolicy = AccessPolicy()) -> ASGIApp:  # noqa: B008  (it is frozen)
    """The application, for a server that `frontend` of the service is attached to."""
    app = build_routes(service)
    return AccessControl(app, policy)


def build_routes(service: Service) -> FastAPI:
    """The application without access control; its `openapi()` describes the API."""
    app = _DescribedApi(
        title="smolrun",
        summary="An HTTP API for one model, as OpenAI's clients know it",
        version="1",
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    api_errors.install(app)
    streams = KeptStreams(service.frontend.metrics)
    app.include_router(openai_routes(service, streams))
    app.include_router(stream_routes(streams))
    app.include_router(simple_routes(service))
    if service.history is not None:
        app.include_router(conversation_routes(service.history))
    _add_server_routes(app, service)
    _add_reference(app)
    add_page(app, service.compare_with)
    return app


class _DescribedApi(FastAPI):
    """Describes itself without the answer 422, which FastAPI assumes; ours is 400."""

    def openapi(self) -> dict[str, Any]:
        """The description, as JSON."""
        schema = super().openapi()
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema


def _add_server_routes(app: FastAPI, service: Service) -> None:
    frontend = service.frontend

    @app.get("/healthz", tags=["server"], response_class=Response)
    async def healthz() -> Response:
        """200 as long as the server answers at all."""
        return json_response({"status": "ok"})

    @app.get("/readyz", tags=["server"], response_class=Response, responses={503: ERRORS[503]})
    async def readyz() -> Response:
        """200 from the moment a token has flowed through all stages, also while an idle server has
        unloaded its model; 503 otherwise, and while a host lacks memory."""
        body: dict[str, Any] = {"status": frontend.state, "model": service.model}
        low = frontend.memory_low()
        if frontend.state == "ready" and low is None:
            return json_response(body)
        body["reason"] = reason = low or frontend.reason
        if frontend.state in ANSWERING and low is None:
            return json_response(body)
        error = api_errors.ApiError(503, reason, code="not_ready")
        return json_response(body | error.body, 503, {"retry-after": "1"})

    @app.get("/cluster", tags=["server"], response_class=Response, responses={401: ERRORS[401]})
    async def cluster() -> Response:
        """The machines that answer: their layers and memory, and what they have done so far."""
        return json_response(frontend.cluster())

    @app.get("/metrics", tags=["server"], response_class=Response, responses={401: ERRORS[401]})
    async def metrics() -> Response:
        """Measurements in the format of Prometheus; vLLM's names are there as well."""
        return Response(frontend.metrics_text(), media_type=CONTENT_TYPE)


def _add_reference(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(api_reference.html(app.openapi()), headers=_REFERENCE_HEADERS)
