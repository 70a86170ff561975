"""What a request passes before any work is done for it: who may ask, and how much.

    request id -> Host -> Origin -> API key -> size and time of the body -> application

A page of another site that a browser shows can send requests here: its Origin gives it away, and
a name of its own that it lets point here (DNS rebinding), its Host. Pure ASGI; one instance a
server.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolrun.serving.api_errors import ApiError, json_response
from smolrun.serving.page import page_files

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
# Without a key: what says nothing but that a server is here, and the page that asks for the key.
OPEN_PATHS = frozenset({*page_files(), "/docs", "/openapi.json", "/healthz", "/readyz", "/health"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A body that is too large is read so far, that its sender comes to read the answer.
_DISCARDED_BYTES = 64 << 20
_BODIES_BYTES = 64 << 20  # of all requests whose bodies are just coming in


@dataclass(frozen=True)
class AccessPolicy:
    """Who may ask. `hosts` are allowed in the Host header beside the loopback names, without a
    port; "*" allows all. `own_address`: so is the address that the request came to. `origins` are
    pages of other sites, such as https://example.org."""

    api_key: str | None = None
    hosts: Sequence[str] = ()
    own_address: bool = False
    origins: Sequence[str] = ()
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 20.0


class _Gone(Exception):
    """The client has left."""


class AccessControl:
    """Wraps an application; on the event loop's thread."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app = app
        self._policy = policy
        self._hosts = {*LOOPBACK_NAMES, *(host.lower() for host in policy.hosts)}
        self._incoming_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        origin = headers.get("origin")
        is_listed = origin is not None and origin in self._policy.origins

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                answer["x-content-type-options"] = "nosniff"
                if is_listed and origin:
                    answer["access-control-allow-origin"] = origin
                    answer["access-control-expose-headers"] = (
                        "x-request-id, x-smolrun-rank, x-smolrun-step, x-smolrun-stream, "
                        "retry-after"
                    )
                    answer["vary"] = "origin"
            await send(message)

        try:
            if (answer := self._preflight(scope, headers, is_listed)) is None:
                self._check(scope, headers, is_listed)
                receive = await self._body(scope, headers, receive)
        except ApiError as error:
            answer = json_response(error.body, error.status, error.headers)
        except _Gone:
            return
        await (answer or self._app)(scope, receive, send_marked)

    def _preflight(self, scope: Scope, headers: Headers, is_listed: bool) -> Response | None:
        """The answer to a browser that asks whether a listed page may send a request."""
        if scope["method"] != "OPTIONS" or not is_listed or not self._is_known_host(scope, headers):
            return None
        wanted = headers.get("access-control-request-headers")  # OpenAI's client sends its own
        allowed = {
            "access-control-allow-methods": "GET, POST, PUT, DELETE",
            "access-control-allow-headers": wanted or "authorization, content-type, x-request-id",
            "access-control-max-age": "600",
        }
        return Response(status_code=204, headers=allowed)

    def _is_known_host(self, scope: Scope, headers: Headers) -> bool:
        host = re.sub(r":\d*$", "", headers.get("host", "").lower())
        # It may have changed since the start, and a number is no name that leads here by DNS.
        is_own = self._policy.own_address and host == (scope.get("server") or [""])[0]
        return is_own or "*" in self._hosts or host in self._hosts

    def _check(self, scope: Scope, headers: Headers, is_listed: bool) -> None:
        """Raises ApiError for a foreign Host or Origin and for a wrong key."""
        if not self._is_known_host(scope, headers):
            message = "this Host is not served; add it to serving.allowed_hosts"
            raise ApiError(403, message, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not is_listed:
            is_own = origin.partition("://")[2].lower() == headers.get("host", "").lower()
            if not is_own:
                message = "pages of this Origin may not ask; add it to serving.cors_origins"
                raise ApiError(403, message, code="origin_not_allowed")
        key = self._policy.api_key
        if key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(), key.encode())
            if kind.lower() != "bearer" or not is_right:
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Reads the whole body, within its limits; a `receive` that gives it."""
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return receive
        declared = headers.get("content-length", "0")
        if self._incoming_bytes > _BODIES_BYTES:
            message = "too many large requests are coming in; try again later"
            raise ApiError(503, message, code="queue_full", headers={"retry-after": "1"})
        try:
            async with asyncio.timeout(self._policy.body_timeout_s):
                body = await self._read(receive, int(declared) if declared.isdigit() else 0)
        except TimeoutError:
            seconds = self._policy.body_timeout_s
            message = f"the body of the request did not come within {seconds:g} s"
            raise ApiError(408, message, code="timeout", headers={"connection": "close"}) from None
        if scope["method"] == "POST":
            # Whatever a client calls it, such as curl -d, only JSON is understood.
            kept = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope["headers"] = [*kept, (b"content-type", b"application/json")]
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    async def _read(self, receive: Receive, declared: int) -> bytes:
        limit, total, parts = self._policy.max_body_bytes, 0, list[bytes]()
        kept = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                part = message.get("body", b"")
                total += len(part)
                if max(total, declared) <= limit:
                    parts.append(part)
                    kept += len(part)
                    self._incoming_bytes += len(part)
                else:
                    parts.clear()
                if total > _DISCARDED_BYTES or not message.get("more_body", False):
                    break
        finally:
            self._incoming_bytes -= kept
        if max(total, declared) > limit:
            message_text = f"the request is larger than {limit:,} bytes"
            headers = {"connection": "close"}
            raise ApiError(413, message_text, code="request_too_large", headers=headers)
        return b"".join(parts)
