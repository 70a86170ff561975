"""How a generation reaches its client: as one JSON answer, or as server-sent events.

Either way the generation is cancelled on all stages as soon as the client leaves.
Source: WHATWG HTML, server-sent events; the frames are those of OpenAI's API.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import msgspec
from fastapi import Request
from sse_starlette.sse import EventSourceResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from smolrun.serving.generation import Generation, Piece, Usage

_KEEP_ALIVE_S = 15
_CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that is gone: it is never sent
DONE = b"data: [DONE]\n\n"


# JSON leaves them as they are, but clients that split text into lines as Python does (httpx's
# iter_lines) would end an event's line there.
_LINE_ENDS = ("\x85", "\u2028", "\u2029")


def event(body: Any) -> bytes:
    """One server-sent event."""
    data: bytes = msgspec.json.encode(body)
    for character in _LINE_ENDS:
        data = data.replace(character.encode(), b"\\u%04x" % ord(character))
    return b"data: " + data + b"\n\n"


def prefill_comment(piece: Piece) -> bytes:
    """How far the prompt is, as a comment, which every client skips."""
    assert piece.prefill is not None
    return f": prefill {piece.prefill.done}/{piece.prefill.total}\n\n".encode()


class EventStream(EventSourceResponse):
    """The events of generations as they come, with comments while none come.

    It closes the generations, not the iterator of events: that one never begins if the client
    leaves first.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        events: AsyncIterator[bytes],
        headers: dict[str, str] | None = None,
    ) -> None:
        self._generations = generations
        super().__init__(
            events,
            headers={"cache-control": "no-cache", **(headers or {})},
            sep="\n",
            ping=_KEEP_ALIVE_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generation in self._generations:
                generation.close()


async def unless_gone(
    request: Request, generations: Sequence[Generation], answer: Coroutine[Any, Any, Response]
) -> Response:
    """Wait for a whole answer; when the client leaves before, cancel its generations."""
    working = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        working.cancel()
        watching.cancel()
        for generation in generations:
            generation.close()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def usage_json(usage: Usage) -> dict[str, Any]:
    """`usage` of OpenAI's answers."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
