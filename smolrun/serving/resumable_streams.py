"""Answers that outlive their connection: generated on, kept, and read on by the next connection.

    POST, x-smolrun-stream: ID            generations --> events 1, 2, 3 ... --> its connection
    GET /v1/streams/ID, Last-Event-ID: 7                  events 8, 9 ...    --> the newest one
    DELETE /v1/streams/ID                 cancelled and forgotten

The client chooses the id, so it knows it whenever its connection breaks. Everything is on the event
loop. Source: WHATWG HTML, server-sent events, for `id:` and Last-Event-ID.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from smolrun.serving.api_errors import ERRORS, ApiError
from smolrun.serving.generation import Generation
from smolrun.serving.http_metrics import ServingMetrics
from smolrun.serving.responses import DONE, Completion, EventStream, event, origin_headers

HEADER = "x-smolrun-stream"
KEEP_S = 120.0  # without a connection
_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_STREAM_BYTES = 4 << 20  # of the events of an answer, about 20,000 tokens; the oldest are dropped
_FINISHED_BYTES = 64 << 20  # of all streams together, else finished ones are dropped
_OVERHEAD_BYTES = 4 << 10  # of a stream without events
_CHUNK_BYTES = 64 << 10

StreamId = Annotated[
    str | None,
    Header(description="Keep the answer under this id of 16 to 64 random letters, digits, - and _"),
]
_Key = tuple[str, str]  # the API key as it was sent, the id


class _KeptStream:
    """The events of an answer. `reader`: the connection that gets them; a newer one replaces it."""

    def __init__(
        self,
        generations: Sequence[Generation],
        events: AsyncIterator[bytes],
        headers: dict[str, str],
    ) -> None:
        self.reader: _Reader | None = None
        self.first, self.last = 1, 0  # numbers of the events that are kept
        self.num_bytes = _OVERHEAD_BYTES
        self.comment = b""  # the newest, while no event has come after it
        self.is_over = False
        self.expiry: asyncio.TimerHandle | None = None
        self._generations = generations
        self._headers = headers
        self._events: dict[int, bytes] = {}
        self._changed = asyncio.Event()
        self.task = asyncio.ensure_future(self._keep(events))
        self.task.add_done_callback(lambda _: self._end())  # also of a task that never began

    @property
    def headers(self) -> dict[str, str]:
        """Of an answer with these events."""
        return origin_headers(self._generations) | self._headers

    async def _keep(self, events: AsyncIterator[bytes]) -> None:
        async for part in events:
            if part.startswith(b":"):
                self.comment = part
            else:
                self._add(part)
            self._changed.set()

    def _add(self, part: bytes) -> None:
        self.last += 1
        self.comment = b""
        self._events[self.last] = part = b"id: %d\n" % self.last + part
        self.num_bytes += len(part)
        while self.num_bytes > _STREAM_BYTES:
            self.num_bytes -= len(self._events.pop(self.first))
            self.first += 1

    def _end(self) -> None:
        for generation in self._generations:
            generation.close()
        self._headers, self._generations = self.headers, ()
        self.is_over = True
        self._changed.set()

    def stop(self, error: ApiError) -> None:
        """Cancel what still runs; its reader gets the error as the last event."""
        if self.expiry is not None:
            self.expiry.cancel()
        if not self.is_over:
            self.task.cancel()
            self._add(event(error.body))
            self._add(DONE)
            self._end()

    def attach(self, reader: _Reader) -> None:
        """The one that gets the events from now on."""
        if self.expiry is not None:
            self.expiry.cancel()
        self.reader = reader
        self._changed.set()

    def since(self, number: int) -> list[bytes]:
        """The events that have come from this one on, not all where they are many."""
        parts, size = list[bytes](), 0
        while size < _CHUNK_BYTES and number + len(parts) in self._events:
            parts.append(self._events[number + len(parts)])
            size += len(parts[-1])
        return parts

    async def change(self) -> None:
        """Until an event or comment has come, the stream is over or has another reader."""
        self._changed.clear()
        await self._changed.wait()


class _Reader:
    """What one connection gets: the events after number `after`, and the newest comment."""

    def __init__(self, stream: _KeptStream, after: int) -> None:
        self._stream = stream
        self._next = after + 1
        self._comment = b""
        self._is_over = False
        stream.attach(self)

    def __aiter__(self) -> _Reader:
        return self

    async def __anext__(self) -> bytes:
        stream = self._stream
        while not self._is_over:
            if stream.reader is not self:
                return self._fail(409, "another connection reads this answer now", "taken_over")
            if self._next < stream.first:
                return self._fail(410, "the client reads too slowly", "events_lost")
            if parts := stream.since(self._next):
                self._next += len(parts)
                return b"".join(parts)
            if stream.comment != self._comment:
                self._comment = stream.comment
                return self._comment
            if stream.is_over:
                break
            await stream.change()
        raise StopAsyncIteration

    def _fail(self, status: int, message: str, code: str) -> bytes:
        # Without a number, as these are not events of the answer.
        self._is_over = True
        return event(ApiError(status, message, code=code).body) + DONE


class KeptStreams:
    """The answers that may be resumed, of one server."""

    def __init__(self, metrics: ServingMetrics) -> None:
        self._streams: dict[_Key, _KeptStream] = {}
        self._resumed = metrics.resumed_streams
        metrics.kept_streams.set_function(lambda: len(self._unread()))
        metrics.kept_bytes.set_function(self._num_bytes)

    async def response(
        self, completion: Completion[Any], request: Request, id: str | None
    ) -> Response:
        """The answer, kept under `id` where there is one; raises ApiError and Unavailable before
        anything is sent."""
        if id is None:
            return await completion.response()
        if not _ID.fullmatch(id) or not completion.body.stream:
            message = f"{HEADER} needs stream=true and 16 to 64 random letters, digits, - and _"
            raise ApiError(400, message, param=HEADER, code="invalid_value")
        key = _key(request, id)
        self._check_new(key)
        generations = await completion.begin()
        headers = {HEADER: id} | completion.headers
        try:
            self._check_new(key)  # another one may have come meanwhile
        except ApiError:
            for generation in generations:
                generation.close()
            raise
        stream = _KeptStream(generations, completion.events(generations), headers)
        stream.task.add_done_callback(lambda _: self._make_room())
        self._streams[key] = stream
        return _Connection(self, key, stream, 0)

    def resume(self, request: Request, id: str, after: int) -> Response:
        """The events after number `after`; ApiError 404, also for the id of another API key."""
        stream = self._find(key := _key(request, id))
        if after > stream.last:
            message = f"the last event so far is {stream.last}"
            raise ApiError(400, message, param="last-event-id", code="invalid_value")
        if after + 1 < stream.first:
            message = f"the events before {stream.first} are no longer kept: the answer is too long"
            raise ApiError(410, message, code="events_lost")
        self._resumed.inc()
        if stream.is_over and after == stream.last:
            return Response(status_code=204)  # the standard's sign to an EventSource to stop
        return _Connection(self, key, stream, after)

    def stop(self, request: Request, id: str) -> None:
        """Cancel an answer and forget it; ApiError 404."""
        self._find(key := _key(request, id))
        self._drop(key, "the answer was stopped")

    def leave(self, key: _Key, reader: _Reader) -> None:
        """A connection has ended; its answer is kept for a while."""
        stream = self._streams.get(key)
        if stream is not None and stream.reader is reader:
            stream.reader = None
            loop = asyncio.get_running_loop()
            message = f"the answer had no connection for {KEEP_S:g} s"
            stream.expiry = loop.call_later(KEEP_S, self._drop, key, message)

    def _check_new(self, key: _Key) -> None:
        if key in self._streams:
            message = f"there is an answer with this {HEADER} already; GET /v1/streams/ID reads it"
            raise ApiError(409, message, param=HEADER, code="stream_exists")

    def _find(self, key: _Key) -> _KeptStream:
        if (stream := self._streams.get(key)) is None:
            message = (
                f"no answer is kept under this id; one without a connection is for {KEEP_S:g} s"
            )
            raise ApiError(404, message, code="stream_not_found")
        return stream

    def _drop(self, key: _Key, reason: str) -> None:
        self._streams.pop(key).stop(ApiError(503, reason, code="stopped"))

    def _unread(self) -> list[_KeptStream]:
        return [one for one in self._streams.values() if one.reader is None]

    def _num_bytes(self) -> int:
        return sum(one.num_bytes for one in self._streams.values())

    def _make_room(self) -> None:
        """Drop finished answers, the oldest first, while all together are too large."""
        for key in [key for key, one in self._streams.items() if one.is_over and not one.reader]:
            if self._num_bytes() <= _FINISHED_BYTES:
                break
            self._drop(key, "there was no room to keep the answer")


class _Connection(EventStream):
    """The events of a kept stream for one connection."""

    def __init__(self, streams: KeptStreams, key: _Key, stream: _KeptStream, after: int) -> None:
        self._streams, self._key = streams, key
        self._reader = _Reader(stream, after)
        super().__init__((), self._reader, stream.headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.leave(self._key, self._reader)


def _key(request: Request, id: str) -> _Key:
    return request.headers.get("authorization", ""), id


def stream_routes(streams: KeptStreams) -> APIRouter:
    """Reading and stopping kept answers."""
    routes = APIRouter(
        tags=["OpenAI"],
        responses={status: ERRORS[status] for status in (400, 401, 403, 404, 410)},
    )

    @routes.get("/v1/streams/{id}", response_class=Response)
    async def resume(
        id: str, request: Request, last_event_id: Annotated[int, Header(ge=0)] = 0
    ) -> Response:
        """Resume an answer after a lost connection: the events after Last-Event-ID, and those to
        come; 204 where all have been read. Another connection that still reads it is ended."""
        return streams.resume(request, id, last_event_id)

    @routes.delete("/v1/streams/{id}", status_code=204, response_class=Response)
    async def stop(id: str, request: Request) -> Response:
        """Stop an answer that would outlive its connection."""
        streams.stop(request, id)
        return Response(status_code=204)

    return routes
