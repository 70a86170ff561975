"""The HTTP application: routes, errors, and what every request passes before them."""

from __future__ import annotations

import re
import secrets
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolrun.serving import api_errors, openai_api
from smolrun.serving.api_errors import json_response
from smolrun.serving.generation import Service

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def build_app(service: Service) -> ASGIApp:
    """The application of one served model."""
    app = FastAPI(title="smolrun", docs_url=None, redoc_url=None)
    api_errors.install(app)
    app.include_router(openai_api.router(service))

    @app.get("/healthz", tags=["server"])
    async def healthz() -> Response:
        """200 as long as the server answers at all."""
        return json_response({"status": "ok"})

    @app.get("/readyz", tags=["server"])
    async def readyz() -> Response:
        """200 from the moment a token has flowed through all stages; 503 otherwise."""
        frontend = service.frontend
        body: dict[str, Any] = {"status": frontend.state, "model": service.model}
        if frontend.state == "ready":
            return json_response(body)
        return json_response(body | {"reason": frontend.reason}, 503, {"retry-after": "1"})

    return RequestIds(app)


class RequestIds:
    """Gives every request an id, that of its header x-request-id if there is one, and returns it
    with the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
