"""A browser's tab that shows the page, and a server for it that answers what a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from smolrun.serving.frontend import Frontend
from smolrun.serving.http_server import HttpServer
from smolrun.serving.page import page_files
from tests.waiting import until


class Tab:
    """A page that is open, and what it complained about."""

    def __init__(self, context: Any, url: str) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.url = url
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.foreign.append(request.url)

    def open(self) -> Tab:
        """Go there, until the server can be asked."""
        self.page.goto(self.url)
        self.page.wait_for_selector("textarea[aria-label=Message]")
        return self

    def send(self, text: str = "Hi") -> None:
        self.page.fill("textarea[aria-label=Message]", text)
        self.page.click("button[aria-label=Send]:enabled")

    def ask(self, text: str = "Hi") -> str:
        """Until the answer is whole."""
        self.send(text)
        return self.whole()

    def whole(self) -> str:
        self.page.wait_for_selector(".answer[aria-busy=false]:last-child .actions", timeout=60_000)
        return self.answer()

    def answer(self) -> str:
        """As a person sees it; empty where there is none yet."""
        prose = self.page.locator(".answer .prose")
        return prose.last.inner_text() if prose.count() else ""

    def says(self, text: str) -> None:
        """Wait for this answer."""
        until(lambda: self.answer() == text)

    def check(self) -> None:
        assert self.complaints == [] and self.foreign == []


@contextmanager
def scripted(
    answers: Callable[[int], Response],
    replicas: Sequence[dict[str, Any]] = (),
    cluster: Callable[[], dict[str, Any]] = dict,
    **config: Any,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The page over a server whose n-th answer is `answers(n)`; its URL, and what it was asked.
    `replicas` and `cluster`: what /cluster says; `config`: /config beside what a test needs."""
    asked: list[dict[str, Any]] = []

    async def chat(request: Request) -> Response:
        asked.append(await request.json())
        return answers(len(asked) - 1)

    shown = {
        "model_name": "scripted", "max_new_tokens": 100, "max_sequence_length": 1000, "top_p": 1.0,
        "temperature": 0.7, "top_k": 0, "answers_chats": True, "thinks": True,
        "num_replicas": max(1, len(replicas)), **config,
    }  # fmt: skip
    routes = [Route(path, file.response) for path, file in page_files().items()]
    routes += [
        Route("/readyz", lambda request: JSONResponse({})),
        Route("/config", lambda request: JSONResponse(shown)),
        Route(
            "/cluster",
            lambda request: JSONResponse({"replicas": replicas, "stages": [], **cluster()}),
        ),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    server = HttpServer(Starlette(routes=routes), Frontend(lambda *_: None))
    try:
        yield server.start(), asked
    finally:
        server.stop(drain_s=0.0)


def frame(text: str = "", key: str = "content", **more: object) -> bytes:
    """One event of an answer."""
    choice = {"index": 0, "delta": {key: text} if text else {}, "finish_reason": None, **more}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


END = [frame(finish_reason="stop"), b"data: [DONE]\n\n"]


def streamed(*parts: bytes | float) -> Response:
    """An answer whose parts come as they are; a number is a pause in seconds."""

    async def content() -> AsyncIterator[bytes]:
        for part in parts:
            if isinstance(part, bytes):
                yield part
                await asyncio.sleep(0)
            else:
                await asyncio.sleep(part)

    return StreamingResponse(content(), media_type="text/event-stream")


def broken(*parts: bytes) -> Response:
    """An answer whose connection breaks."""

    async def content() -> AsyncIterator[bytes]:
        for part in parts:
            yield part
            await asyncio.sleep(0.05)
        raise ConnectionResetError

    return StreamingResponse(content(), media_type="text/event-stream")


def refused(status: int, message: str, **headers: str) -> Response:
    """An error as the API sends it."""
    return JSONResponse({"error": {"message": message, "code": "x"}}, status, headers)
