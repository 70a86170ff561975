"""Answers that outlive their connection: resumed, taken over, stopped, expired, bounded."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from smolrun.serving import resumable_streams
from smolrun.serving.access import AccessPolicy
from smolrun.serving.resumable_streams import HEADER, KEEP_S
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, says, served
from tests.serving.test_http_server import CHAT, raw_request
from tests.waiting import SOON_S, until

ID = "0123456789abcdef-_XY"
TEXT = "Grüße, 漢字 and 🎉. " * 12
GET = f"/v1/streams/{ID}"


def contents(frames: bytes | str) -> list[tuple[int | None, str]]:
    """The number and the data of every event; comments are left out."""
    text = frames.decode() if isinstance(frames, bytes) else frames
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] not in ":\n")
        if "data" in fields:
            found.append((int(fields["id"]) if "id" in fields else None, fields["data"]))
    return found


def text_of(found: list[tuple[int | None, str]]) -> str:
    """The answer that chunks of a chat add up to."""
    chunks = [json.loads(data) for _, data in found if data != "[DONE]"]
    return "".join(
        choice["delta"].get("content", "") for one in chunks for choice in one["choices"]
    )


def begun(server: Served, events: int = 3, id: str = ID, **fields: Any) -> bytes:
    """A kept answer whose connection was cut after some events; whole frames that had come."""
    with server.connected() as connection:
        request = raw_request(CHAT | {"stream": True} | fields)
        head = f"{HEADER}: {id}\r\n".encode()
        connection.sendall(request.replace(b"\r\n\r\n", b"\r\n" + head + b"\r\n", 1))
        received = b""
        while len(re.findall(rb"id: \d+", received)) <= events:
            part = connection.recv(4096)
            assert part, received
            received += part
    # HTTP sends every event as a chunk of its own.
    lines = [line for line in received.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2] if line]
    return b"".join(line for line in lines if line.endswith(b"\n\n"))


def resumed(server: Served, after: int | None = None, **headers: str) -> httpx.Response:
    """What is left of the answer, to its end."""
    more = {} if after is None else {"last-event-id": str(after)}
    return server.client.get(GET, headers=more | headers)


def metric(server: Served, name: str) -> float:
    """One value of /metrics."""
    text = server.client.get("/metrics").text
    return float(re.findall(rf"^smolrun_{name} (\S+)$", text, re.MULTILINE)[0])


def is_unread(server: Served, count: int = 1) -> bool:
    return metric(server, "streams_kept") == count


def later(server: Served, seconds: float) -> None:
    """Let time pass for the server."""
    loop = server.server._loop
    clock = loop.time
    loop.time = lambda: clock() + seconds  # type: ignore[method-assign]
    loop.call_soon_threadsafe(lambda: None)  # it waits by the old time


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    running: list[Any] = []
    clients: list[httpx.Client] = []

    def begin(text: str = TEXT, policy: AccessPolicy | None = None, **engine: Any) -> Served:
        context = served(
            FakeEngine(says(text), **{"step_s": 0.005, "max_sequence_length": 4096} | engine),
            tmp_path,
            policy,
        )
        running.append(context)
        server = context.__enter__()
        # Time is let pass: connections that wait for another request would be closed.
        limits = httpx.Limits(max_keepalive_connections=0)
        server.client = httpx.Client(base_url=server.url, timeout=SOON_S, limits=limits)
        clients.append(server.client)
        return server

    yield begin
    for client in clients:
        client.close()
    for context in running:
        context.__exit__(None, None, None)


def test_a_cut_connection_is_resumed_without_a_gap(start):
    server = start()
    first = contents(begun(server))
    until(lambda: is_unread(server))
    answer = resumed(server, first[-1][0])
    rest = contents(answer.text)
    assert answer.headers[HEADER] == ID
    assert [number for number, _ in first + rest] == list(range(1, len(first + rest) + 1))
    assert text_of(first + rest) == TEXT and rest[-1][1] == "[DONE]"
    assert len(server.engine.submitted) == 1 and server.engine.cancelled == []
    assert metric(server, "streams_resumed_total") == 1


def test_a_finished_answer_is_there_for_two_minutes(start):
    server = start("Yes", step_s=0.0)
    begun(server)
    until(server.is_at_rest)
    assert text_of(contents(resumed(server).text)) == "Yes"
    until(lambda: is_unread(server))
    later(server, KEEP_S - 5)
    whole = contents(resumed(server, 0).text)
    assert [data for _, data in whole][-1] == "[DONE]"
    assert resumed(server, whole[-1][0]).status_code == 204
    until(lambda: is_unread(server))
    later(server, KEEP_S + 5)
    until(lambda: resumed(server).status_code == 404)
    assert metric(server, "streams_bytes") == 0


def test_an_answer_that_nobody_reads_is_cancelled_in_the_end(start):
    server = start("x" * 4000)
    begun(server)
    until(lambda: is_unread(server))
    later(server, KEEP_S - 5)
    before = server.engine.generated
    until(lambda: server.engine.generated > before + 3)
    later(server, 10)
    until(server.is_at_rest)
    assert len(server.engine.cancelled) == 1
    assert resumed(server).json()["error"]["code"] == "stream_not_found"


def test_without_the_header_a_lost_connection_still_cancels(start):
    server = start("x" * 4000)
    with server.connected() as connection:
        connection.sendall(raw_request(CHAT | {"stream": True}))
        connection.recv(100)
    until(server.is_at_rest)
    assert len(server.engine.cancelled) == 1 and is_unread(server, 0)


def test_text_completions_and_several_choices_are_kept_too(start):
    server = start("abcd", step_s=0.02)
    body = {"model": "fake", "prompt": ["Hi", "Ho"], "n": 2, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body, headers={HEADER: ID}) as one:
        assert next(one.iter_lines())
    texts = ["", "", "", ""]
    for _, data in contents(resumed(server).text)[:-1]:
        for choice in json.loads(data)["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["abcd"] * 4


@contextmanager
def reading(server: Served) -> Iterator[socket.socket]:
    """A connection that resumes, and has read something."""
    with server.connected() as connection:
        connection.sendall(f"GET {GET} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """Until the end of the answer."""
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        part = connection.recv(65536)
        assert part
        received += part
    return received


def test_the_newest_of_several_connections_gets_the_rest(start):
    server = start(step_s=0.05)
    begun(server)
    with reading(server) as one, reading(server) as two:
        text = rest_of(one)
        assert b'"code":"taken_over"' in text and text.count(b"[DONE]") == 1
        with server.client.stream("GET", GET) as answer:
            assert b'"code":"taken_over"' in rest_of(two)
            server.engine.step_s = 0.0
            third = contents(answer.read())
    assert text_of(third) == TEXT
    assert len(server.engine.submitted) == 1


def test_an_old_connection_that_hangs_half_open_is_taken_over(start):
    """Its client is gone without a word, so nothing that is sent to it is ever taken."""
    server = start(step_s=0.05)
    with server.connected() as hanging:
        request = raw_request(CHAT | {"stream": True}).replace(
            b"\r\n\r\n", f"\r\n{HEADER}: {ID}\r\n\r\n".encode(), 1
        )
        hanging.sendall(request)
        until(lambda: server.engine.generated > 2)
        assert is_unread(server, 0)
        with server.client.stream("GET", GET) as answer:
            server.engine.step_s = 0.0
            assert text_of(contents(answer.read())) == TEXT
        assert b'"code":"taken_over"' in rest_of(hanging)


def test_stop_frees_the_slot_and_ends_the_reader(start):
    server = start("x" * 4000)
    begun(server)
    with reading(server) as connection:
        assert server.client.delete(GET).status_code == 204
        until(server.is_at_rest)
        assert b'"code":"stopped"' in rest_of(connection)
    for method in ("GET", "DELETE"):
        assert server.client.request(method, GET).status_code == 404
    assert metric(server, "streams_bytes") == 0


def test_an_answer_is_the_own_of_its_key(start):
    """Another key, as a server without keys lets clients send, and an id that never was: the same
    404. A wrong key of a server that has one: 401 before that."""
    server = start("x" * 4000)
    begun(server)
    until(lambda: is_unread(server))
    foreign = resumed(server, authorization="Bearer other")
    unknown = server.client.get("/v1/streams/0000000000000000")
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json() == unknown.json()
    assert server.client.delete(GET, headers={"authorization": "Bearer x"}).status_code == 404
    assert is_unread(server) and server.engine.load == 1
    locked = start("x", AccessPolicy(api_key="right"))
    assert resumed(locked, authorization="Bearer wrong").status_code == 401


@pytest.mark.parametrize("id", ["short", "x" * 65, "0123456789abcdef/../", "0123456789abcdé!"])
def test_an_id_that_could_be_guessed_is_refused(start, id: str):
    server = start("x")
    answer = server.client.post(
        "/v1/chat/completions", json=CHAT | {"stream": True}, headers={HEADER: id.encode()}
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == HEADER
    assert server.engine.submitted == []


def test_requests_that_cannot_be_kept_are_refused(start):
    server = start("x" * 4000)
    post = lambda **fields: server.client.post(  # noqa: E731
        "/v1/chat/completions", json=CHAT | fields, headers={HEADER: ID}
    )
    assert post().json()["error"]["param"] == HEADER  # not a stream
    assert post(stream=True, model="other").status_code == 404
    assert resumed(server).status_code == 404
    begun(server)
    again = post(stream=True)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "stream_exists")
    assert len(server.engine.submitted) == 1
    for after in ("1000000", "-1", "x"):
        answer = server.client.get(GET, headers={"last-event-id": after})
        assert answer.status_code == 400, after
        assert answer.json()["error"]["param"] == "last-event-id"


def test_two_requests_with_one_id_at_once_are_one_answer(start):
    """Also where both are checked before either has begun: a long prompt is encoded elsewhere."""
    server = start("x" * 4000)
    body = {"model": "fake", "prompt": "a" * 2500, "stream": True}

    async def one(client: httpx.AsyncClient) -> int:
        path, headers = "/v1/completions", {HEADER: ID}
        async with client.stream("POST", path, json=body, headers=headers) as answer:
            return answer.status_code

    async def all_at_once() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url) as client:
            return sorted(await asyncio.gather(*(one(client) for _ in range(6))))

    assert asyncio.run(all_at_once()) == [200, *[409] * 5]
    until(lambda: server.engine.load == 1)


def test_what_runs_unread_counts_like_any_request(start):
    server = start("x" * 4000, slots=1)
    server.service.frontend._max_waiting = 1
    begun(server)
    begun(server, events=-1, id="another-one-0000")
    until(lambda: is_unread(server, 2))
    answer = server.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")


def test_memory_is_bounded_by_dropping_the_oldest_events(start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        resumable_streams, "_STREAM_BYTES", resumable_streams._OVERHEAD_BYTES + 2000
    )
    server = start("x" * 50, step_s=0.0)
    begun(server)
    until(server.is_at_rest)
    assert resumed(server).json()["error"]["code"] == "events_lost"
    assert resumed(server).status_code == 410
    assert metric(server, "streams_bytes") <= resumable_streams._STREAM_BYTES


def test_finished_answers_make_room_the_oldest_first(start, monkeypatch: pytest.MonkeyPatch):
    server = start("x" * 50, step_s=0.0)
    begun(server)
    until(lambda: server.is_at_rest() and is_unread(server))
    size = int(metric(server, "streams_bytes"))
    monkeypatch.setattr(resumable_streams, "_FINISHED_BYTES", int(2.5 * size))
    ids = ["a" * 16, "b" * 16]
    for count, id in enumerate(ids):
        begun(server, id=id)
        until(lambda count=count: server.is_at_rest() and is_unread(server, 2))  # type: ignore[misc]
    assert resumed(server).status_code == 404
    assert [server.client.get(f"/v1/streams/{id}").status_code for id in ids] == [200, 200]


def test_comments_are_not_kept_but_the_newest_is_shown(start):
    server = start("x" * 100, prefill_steps=10_000, step_s=0.001)
    begun(server, events=0)
    with reading(server) as connection:
        received = b""
        while b": prefill" not in received:
            part = connection.recv(4096)
            assert part
            received += part
        assert b"id: 1\n" in received


def test_a_server_that_ends_tells_the_reader(start):
    server = start("x" * 4000, step_s=0.01)
    begun(server)
    with reading(server) as connection:
        server.server.stop(drain_s=0.1)
        received = rest_of(connection)
    assert b"the server is being shut down" in received and b"data: [DONE]" in received


def test_disconnects_leave_nothing_when_their_time_is_over(start):
    """200, at any moment."""
    server = start("x" * 50, step_s=0.002, slots=8)
    server.service.frontend._max_waiting = 400
    dice = random.Random(1)

    async def leave(number: int) -> None:
        request = raw_request(CHAT | {"stream": True})
        head = f"\r\n{HEADER}: {number:016}\r\n\r\n".encode()
        request = request.replace(b"\r\n\r\n", head, 1)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request[: dice.choice([5, len(request) - 3, len(request), len(request)])])
        await writer.drain()
        await asyncio.sleep(dice.random() * 0.1)
        writer.transport.abort() if dice.random() < 0.3 else writer.close()

    async def crowd() -> None:
        for at in range(10):
            await asyncio.gather(*(leave(20 * at + number) for number in range(20)))

    asyncio.run(crowd())
    assert len(server.engine.submitted) > 50
    until(lambda: is_unread(server, len(server.engine.submitted)))
    later(server, KEEP_S + 1)
    until(server.is_at_rest)
    until(lambda: is_unread(server, 0))
    assert metric(server, "streams_bytes") == 0
    assert "\nsmolrun_requests_open 0.0\n" in server.client.get("/metrics").text
