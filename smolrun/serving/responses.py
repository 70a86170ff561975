"""How generations reach their client: as one JSON answer, or as server-sent events.

Either way they are cancelled on all stages as soon as the client leaves.
Source: WHATWG HTML, server-sent events; the frames are those of OpenAI's API.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import astuple
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from fastapi import Request
from sse_starlette.sse import EventSourceResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from smolrun.serving.api_errors import ApiError, json_response
from smolrun.serving.generation import Generation, Piece, Service, merged
from smolrun.serving.protocol import ChatRequest, CompletionRequest

Body = TypeVar("Body", bound=ChatRequest | CompletionRequest)

_KEEP_ALIVE_S = 15
_CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that is gone: it is never sent
DONE = b"data: [DONE]\n\n"
LOADING = b": loading the model, which was unloaded while nothing was asked\n\n"


# JSON leaves them as they are, but clients that split text into lines as Python does (httpx's
# iter_lines) would end an event's line there.
_LINE_ENDS = ("\x85", "\u2028", "\u2029")


def event(body: Any) -> bytes:
    """One server-sent event."""
    data: bytes = msgspec.json.encode(body)
    for character in _LINE_ENDS:
        data = data.replace(character.encode(), b"\\u%04x" % ord(character))
    return b"data: " + data + b"\n\n"


def comments(piece: Piece) -> Iterator[bytes]:
    """What an answer waits for, or how far its prompt is, as comments, which every client skips."""
    if piece.queued is not None:
        yield f": queued {piece.queued}\n\n".encode()
    if piece.prefill is not None:
        yield f": prefill {piece.prefill.done}/{piece.prefill.total}\n\n".encode()
    if piece.recovering is not None:
        yield f": recovering {' '.join(piece.recovering.split())}\n\n".encode()


def origin_headers(generations: Sequence[Generation]) -> dict[str, str]:
    """The replicas that have answered so far, in order, and the steps of their weights."""
    ranks = dict.fromkeys(rank for one in generations for rank in one.replicas)
    steps = dict.fromkeys(one.step for one in generations if one.step)
    found = {"x-smolrun-rank": ranks, "x-smolrun-step": steps}
    return {name: ",".join(map(str, values)) for name, values in found.items() if values}


def _fingerprint(generations: Sequence[Generation]) -> dict[str, str]:
    """OpenAI's name of the weights that an answer is from; nothing where they never change."""
    steps = sorted({one.step for one in generations if one.step})
    return {"system_fingerprint": "step-" + ",".join(map(str, steps))} if steps else {}


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
            headers={"cache-control": "no-cache", **origin_headers(generations), **(headers or {})},
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


class Completion(ABC, Generic[Body]):
    """A request of OpenAI's API and its answer. A subclass is one kind of them: it makes the
    generations, and the entries of `choices` as a stream shows them; a whole answer is their sum.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, service: Service, body: Body, request: Request) -> None:
        self.service = service
        self.body: Body = body
        self.request_id = str(request.state.request_id)
        self.n = body.n or 1
        self.headers: dict[str, str] = {}
        self.notes: list[str] = []  # for people, on what of the request does not count
        self._request = request
        self._created = int(time.time())

    async def response(self) -> Response:
        """The answer or its events; raises ApiError and Unavailable before anything is sent."""
        generations = await self.begin()
        if self.body.stream:
            return EventStream(generations, self.events(generations), self.headers)
        return await unless_gone(self._request, generations, self._whole(generations))

    @abstractmethod
    async def begin(self) -> list[Generation]:
        """The generations of all prompts, after every check."""

    @abstractmethod
    def entries(self, prompt: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece of a prompt's generation adds to `choices`."""

    def first_entries(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        yield from ()

    def empty_choice(self, index: int) -> dict[str, Any]:
        """An entry of a whole answer before its first piece."""
        return {}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}-{self.request_id}",
            "object": kind,
            "created": self._created,
            "model": self.service.model,
        }

    async def _whole(self, generations: list[Generation]) -> Response:
        choices = [self.empty_choice(index) for index in range(len(generations) * self.n)]
        async for prompt, piece in merged(generations):
            for entry in self.entries(prompt, piece):
                _extend(choices[entry["index"]], entry)
        answer = {"choices": choices, "usage": _usage(generations)}
        headers = origin_headers(generations) | self.headers
        head = self._head(self.kind) | _fingerprint(generations)
        return json_response(head | answer, headers=headers)

    async def events(self, generations: list[Generation]) -> AsyncIterator[bytes]:
        """Of the whole stream, and comments; errors are events too."""
        wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        head, last = self._head(self.chunk_kind), {"usage": None} if wants_usage else {}
        try:
            for entry in self.first_entries():
                yield event(head | {"choices": [entry]} | last)
            if any(one.stream.waits_for_model for one in generations):
                yield LOADING
            async for prompt, piece in merged(generations):
                for comment in comments(piece):
                    yield comment
                for entry in self.entries(prompt, piece):
                    yield event(head | _fingerprint(generations) | {"choices": [entry]} | last)
            if wants_usage:
                head |= _fingerprint(generations)
                yield event(head | {"choices": [], "usage": _usage(generations)})
        except ApiError as error:
            yield event(error.body)
        yield DONE


def _extend(known: dict[str, Any], new: dict[str, Any]) -> None:
    """Append texts and lists, deep in as well."""
    for name, value in new.items():
        key = "message" if name == "delta" else name  # the same thing, whole
        if known.get(key) is None:
            known[key] = value
        elif isinstance(value, dict):
            _extend(known[key], value)
        elif isinstance(value, str | list):
            known[key] += value


def _usage(generations: list[Generation]) -> dict[str, Any]:
    """`usage` of OpenAI's answers, of all prompts together."""
    columns = zip(*(astuple(one.usage) for one in generations), strict=True)
    prompt_tokens, completion_tokens, cached_tokens = map(sum, columns)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
