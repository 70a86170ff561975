"""Errors of the HTTP API in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

Every answer that is no success goes through here, so that no client ever sees another shape, and
no request is answered by a 500 but for a defect of this program.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path

from smolrun.serving.output_stream import Unavailable
from smolrun.serving.protocol import ErrorAnswer

# For the description of the API: what any of its paths may answer.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in (
        (400, "The request is wrong"),
        (401, "The API key is missing or wrong"),
        (403, "This Host or Origin is not served"),
        (404, "There is no such model or path"),
        (408, "The request came too slowly"),
        (409, "An answer is kept under this id already"),
        (410, "The events that are asked for are no longer kept"),
        (413, "The request is too large"),
        (429, "The queue is full; see Retry-After"),
        (503, "The server is not ready, or the engine failed; see Retry-After"),
        (504, "The answer took too long"),
    )
}
_CODES = {404: "not_found", 405: "method_not_allowed"}
_LONGEST_MESSAGE = 500  # characters


class ApiError(Exception):
    """An answer with an error status. `param` names the field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer, or of an event in a stream that has begun."""
        if self.status == 401:
            kind = "authentication_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        # A text that came with the request may hold what UTF-8 has no bytes for.
        message = self.message.encode("utf-8", "replace").decode()[:_LONGEST_MESSAGE]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def refuse(**asked: bool) -> None:
    """What would change the answer and is not supported is refused by name; ApiError."""
    for name, is_asked in asked.items():
        if is_asked:
            message = f"{name} is not supported by this server; leave it out"
            raise ApiError(400, message, param=name, code="unsupported_parameter")


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def install(app: FastAPI) -> None:
    """Answer every exception of a request in the shape of this module."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(Unavailable, _unavailable)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _defect)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error.body, error.status, error.headers)


async def _unavailable(request: Request, error: Exception) -> Response:
    assert isinstance(error, Unavailable)
    status, code = (429, "queue_full") if error.is_full else (503, "not_ready")
    headers = {"retry-after": str(error.retry_after_s)}
    return await _api_error(request, ApiError(status, str(error), code=code, headers=headers))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = min(error.errors(), key=_irrelevance)
    field = _field(first["loc"])
    code = None
    if first["type"] == "json_invalid":
        detail, field = f"is not valid JSON: {first.get('ctx', {}).get('error', '')}", None
        message = f"the request {detail}"
    elif first["type"] == "missing":
        message = f"{field or 'the body'} is required"
        code = "missing_required_parameter"
    else:
        message = f"{field or 'the request'}: {first['msg']}"
    return await _api_error(
        request, ApiError(400, message, param=field, code=code or "invalid_value")
    )


def _irrelevance(error: Any) -> tuple[bool, bool, int]:
    """Of the alternatives of a union, the one that was meant has no wrong type, or only deep in."""
    return error["type"] != "json_invalid", error["type"].endswith("_type"), -len(error["loc"])


def _field(location: tuple[int | str, ...]) -> str | None:
    """messages[0].content of ("body", "messages", 0, "content", "str")."""
    text = ""
    for part in location[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[\w-]+", part) and part not in _ALTERNATIVES:
            text += f".{part}" if text else part
    return text or None


# How pydantic names the alternatives of a union, which are no fields.
_ALTERNATIVES = {"str", "int", "float", "bool", "nullable"}


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405 and (methods := _methods(request)):
        headers = {"allow": ", ".join(methods)}
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _api_error(
        request,
        ApiError(error.status_code, message, code=_CODES.get(error.status_code), headers=headers),
    )


def _methods(request: Request) -> list[str]:
    """That a path of the description has; Starlette says those of its first route only."""
    described = request.app.openapi()["paths"].items()
    found = [ways for path, ways in described if compile_path(path)[0].match(request.url.path)]
    return sorted({method.upper() for ways in found for method in ways})


async def _defect(request: Request, error: Exception) -> Response:
    # Starlette raises it again behind this answer, so that uvicorn writes it to the log.
    message = "internal error; the log of the server has the details"
    return await _api_error(request, ApiError(500, message, code="internal_error"))
