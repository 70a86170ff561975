"""The server as a whole: clients that leave, are slow, are too many; draining, faults, the port."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from smolrun.serving.access import AccessPolicy
from smolrun.serving.api import build_app
from smolrun.serving.frontend import Frontend
from smolrun.serving.http_connection import ConnectionLimits
from smolrun.serving.http_server import HttpServer
from smolrun.serving.messages import Ready
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, echoes, events, says, served
from tests.waiting import SOON_S, until

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
ENDLESS = says("x" * 400)


def slow(step_s: float = 0.02, **fields: Any) -> FakeEngine:
    """An engine that is busy for long with every request."""
    return FakeEngine(ENDLESS, step_s=step_s, **fields)


def lines_of(server: Served, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    """A stream that has begun."""
    body = CHAT | {"stream": True} | fields
    return server.client.stream("POST", path, json=body)


def raw_request(fields: dict[str, Any]) -> bytes:
    """A request for a chat, as bytes."""
    body = json.dumps(CHAT | fields).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    )
    return head.encode() + b"\r\n" + body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled(tmp_path: Path, stream: bool):
    with served(slow(), tmp_path) as server:
        with server.connected() as connection:
            connection.sendall(raw_request({"stream": stream}))
            until(lambda: server.engine.generated > 3)
            if stream:
                assert connection.recv(12) == b"HTTP/1.1 200"
        until(server.is_at_rest)
        assert len(server.engine.cancelled) == 1
        until(lambda: 'finished_reason="abort"} 1.0' in server.client.get("/metrics").text)


def test_a_client_that_leaves_while_it_waits_is_cancelled(tmp_path: Path):
    with served(slow(slots=1), tmp_path) as server, lines_of(server) as first:
        with server.connected() as connection:
            connection.sendall(raw_request({}))
            until(lambda: server.engine.load == 2)
        until(lambda: server.engine.load == 1)
        assert next(first.iter_lines())


def test_a_client_that_leaves_within_its_request_leaves_nothing(tmp_path: Path):
    with served(slow(), tmp_path) as server:
        for data in (b"POST /v1/chat", raw_request({})[:-5]):
            with server.connected() as connection:
                connection.sendall(data)
        assert server.client.get("/healthz").status_code == 200
        assert server.engine.submitted == []


def test_an_abandoned_prefill_is_cancelled(tmp_path: Path):
    with served(slow(prefill_steps=10_000), tmp_path) as server:
        with lines_of(server) as answer:
            assert any(line == ": prefill 2/2" for line in answer.iter_lines())
        until(server.is_at_rest)


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.soak)])
def test_disconnects_at_any_moment_leave_nothing(tmp_path: Path, rounds: int):
    """20 a round; the long test measures as well, on a machine with nothing else to do."""
    engine = FakeEngine(says("x" * 50), step_s=0.01, slots=8)
    dice = random.Random(1)
    process = psutil.Process()

    async def leave(server: Served, stream: bool) -> None:
        """Ask, and leave at any moment: before, during or after the answer."""
        request = raw_request({"stream": stream})
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request[: dice.choice([5, len(request) - 3, len(request), len(request)])])
        await writer.drain()
        await asyncio.sleep(dice.random() * 0.3)
        if dice.random() < 0.3:
            writer.transport.abort()
        writer.close()

    async def crowd(server: Served) -> None:
        for _ in range(rounds):
            await asyncio.gather(*(leave(server, dice.random() < 0.5) for _ in range(20)))

    with served(engine, tmp_path) as server:
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        asyncio.run(crowd(server))
        begun = time.monotonic()
        until(server.is_at_rest)
        rested_s = time.monotonic() - begun
        text = server.client.get("/metrics").text
        assert "\nsmolrun_requests_open 0.0\n" in text
        assert "\nsmolrun_requests_running 0.0\n" in text
        assert "\nsmolrun_requests_waiting 0.0\n" in text
        if before:
            until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2)
        if rounds == 50:
            print(f"{1000 * rested_s:.0f} ms after the last one left")
            assert rested_s <= 0.5
            used = sum(process.cpu_times()[:2])
            time.sleep(2.0)
            assert sum(process.cpu_times()[:2]) - used < 0.4  # it rests


def test_connections_that_send_nothing_keep_nobody_out(tmp_path: Path):
    limits = ConnectionLimits(max_connections=100)
    with served(FakeEngine(echoes), tmp_path, limits=limits) as server, ExitStack() as stack:
        silent = [stack.enter_context(server.connected()) for _ in range(200)]
        begun = time.monotonic()
        assert httpx.post(server.url + "/v1/chat/completions", json=CHAT).status_code == 200
        assert time.monotonic() - begun < SOON_S / 2
        closed = 0
        for connection in silent:
            connection.setblocking(False)
            try:
                closed += connection.recv(1) == b""
            except BlockingIOError:
                pass
        assert closed >= 100  # the oldest had to go, the newest are still there


def test_the_connection_that_is_idle_longest_is_closed_not_the_oldest(tmp_path: Path):
    limits = ConnectionLimits(max_connections=10)
    with served(FakeEngine(echoes), tmp_path, limits=limits) as server, ExitStack() as stack:
        used = stack.enter_context(server.connected())
        for _ in range(5):
            for _ in range(4):  # those of two rounds have room, as a server may accept them late
                stack.enter_context(server.connected())
            used.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                part = used.recv(4096)
                assert part, "closed"
                answer += part
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_one_connection_too_many_is_told_so_when_all_are_busy(tmp_path: Path):
    limits = ConnectionLimits(max_connections=2)
    with served(slow(), tmp_path, limits=limits) as server, ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(server.connected())
            connection.sendall(raw_request({"stream": True}))
            assert connection.recv(12) == b"HTTP/1.1 200"
        answer = httpx.get(server.url + "/healthz")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "too_many_connections"


def one_byte_at_a_time(connection: socket.socket, data: bytes) -> bytes:
    """Sends slowly until there is an answer; the answer."""
    connection.settimeout(0.02)
    deadline = time.monotonic() + SOON_S
    for at in range(len(data)):
        assert time.monotonic() < deadline
        connection.sendall(data[at : at + 1])
        try:
            return connection.recv(4096)
        except TimeoutError:
            pass
    raise AssertionError("everything was accepted")


def test_a_request_that_comes_a_byte_at_a_time_is_given_up(tmp_path: Path):
    limits, policy = ConnectionLimits(header_timeout_s=0.3), AccessPolicy(body_timeout_s=0.3)
    request = raw_request({"user": "x" * 2000})
    with served(FakeEngine(echoes), tmp_path, policy, limits) as server:
        with server.connected() as connection:
            assert one_byte_at_a_time(connection, b"GET /healthz?" + b"x" * 2000).startswith(
                b"HTTP/1.1 408 "
            )
        with server.connected() as connection:  # the second request of a connection as well
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b" 408 " in one_byte_at_a_time(connection, b"GET /" + b"x" * 2000)
        with server.connected() as connection:
            head, _, body = request.partition(b"\r\n\r\n")
            connection.sendall(head + b"\r\n\r\n")
            assert one_byte_at_a_time(connection, body).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("reads", [False, True], ids=["nothing", "a byte at a time"])
def test_a_client_that_hardly_reads_holds_nobody(tmp_path: Path, reads: bool):
    engine = FakeEngine(lambda submit, _: b"x" * submit.max_tokens, slots=2)
    engine.max_sequence_length = 2000
    limits = ConnectionLimits(write_timeout_s=0.5)
    with served(engine, tmp_path, limits=limits) as server, socket.socket() as connection:
        # So that little is on its way. What the server accepts inherits it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener = server.server._listener
        assert listener is not None
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.settimeout(SOON_S)
        connection.connect(("127.0.0.1", server.port))
        fields = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 400}
        connection.sendall(raw_request(fields))
        until(lambda: server.engine.load == 1)
        for _ in range(3):
            assert server.chat(max_tokens=3).json()["usage"]["completion_tokens"] == 3

        def is_given_up() -> bool:
            with suppress(ConnectionError):  # it has been given up just now
                assert not reads or connection.recv(1)
            return server.is_at_rest()

        until(is_given_up)


def test_a_long_prompt_that_is_being_encoded_holds_nobody(tmp_path: Path):
    with served(slow(), tmp_path) as server, lines_of(server) as answer:
        lines, encode = answer.iter_lines(), server.service.prompts.text
        has_begun, may_end = threading.Event(), threading.Event()

        def slowly(text: str) -> list[int]:
            has_begun.set()
            assert may_end.wait(SOON_S)
            return encode(text)

        server.service.prompts.text = slowly  # type: ignore[method-assign]
        body = {"model": "fake", "prompt": "a" * 3000}
        with httpx.Client(base_url=server.url, timeout=SOON_S) as other:
            results: list[int] = []
            long = threading.Thread(
                target=lambda: results.append(other.post("/v1/completions", json=body).status_code)
            )
            long.start()
            assert has_begun.wait(SOON_S)
            assert server.client.get("/healthz").status_code == 200
            for _ in range(20):
                assert next(lines) is not None
            assert not results
            may_end.set()
            long.join(SOON_S)
        assert results == [400]  # it was too long


def test_bodies_that_come_in_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smolrun.serving.access._BODIES_BYTES", 1000)
    with served(FakeEngine(echoes), tmp_path) as server:
        with server.connected() as connection:
            connection.sendall(raw_request({"user": "x" * 2000})[:-5])
            until(lambda: server.chat().status_code == 503)
            answer = server.chat()
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"
            assert server.client.get("/healthz").status_code == 200
        until(lambda: server.chat().status_code == 200)


def test_the_server_answers_while_all_slots_work(tmp_path: Path):
    with served(slow(0.005, slots=2), tmp_path) as server, ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(lines_of(server))
        times = []
        for path in ("/healthz", "/readyz", "/health", "/metrics", "/v1/models") * 4:
            begun = time.monotonic()
            assert server.client.get(path).status_code == 200
            times.append(time.monotonic() - begun)
        assert sorted(times)[len(times) // 2] < 1.0


def test_what_finds_no_room_is_refused_at_once(tmp_path: Path):
    engine = slow(0.01, slots=1)
    engine.frontend = Frontend(engine.send, max_waiting=2)
    with served(engine, tmp_path) as server, ExitStack() as stack:
        for count in range(3):
            stack.enter_context(lines_of(server))
            until(lambda count=count: server.engine.load == count + 1)  # type: ignore[misc]
        for answer in (server.chat(), server.complete(), server.chat(stream=True)):
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert server.client.post("/chat", json={"text": "Hi"}).status_code == 429
        assert len(server.engine.submitted) == 3
        text = server.client.get("/metrics").text
        assert 'smolrun_requests_refused_total{code="queue_full"} 4.0' in text
        assert "\nvllm:num_requests_running 1.0\n" in text
        assert "\nvllm:num_requests_waiting 2.0\n" in text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/chat"])
def test_a_stream_says_how_many_are_before_it(tmp_path: Path, path: str):
    fields = {"text": "Hi", "prompt": "Hi", "max_tokens": 2}
    with served(slow(slots=1), tmp_path) as server, ExitStack() as stack:
        others = [ExitStack(), ExitStack()]
        for count, other in enumerate(others):
            stack.enter_context(other)
            other.enter_context(lines_of(server))
            until(lambda count=count: server.engine.load == count + 1)  # type: ignore[misc]
        lines = stack.enter_context(lines_of(server, path, **fields)).iter_lines()
        assert ": queued 1" in takewhile(lambda line: line != ": queued 0", lines)
        for other in others:
            other.close()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        text = json.dumps(chunks)
        assert text.count("x") >= 2 and "queued" not in text


def test_a_request_has_a_deadline(tmp_path: Path):
    with served(slow(), tmp_path, request_timeout_s=0.3) as server:
        answer = server.chat()
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        chunks = events(server.chat(stream=True).text)
        assert chunks[-1]["error"]["code"] == "deadline_exceeded"
        until(server.is_at_rest)


@pytest.fixture
def draining(tmp_path: Path) -> Iterator[Served]:
    with served(slow(0.005), tmp_path) as server:
        yield server


def test_stop_lets_the_running_answers_end_and_takes_no_new_ones(draining: Served):
    with lines_of(draining) as answer, httpx.Client(base_url=draining.url) as other:
        lines = answer.iter_lines()
        assert next(lines)
        stopping = threading.Thread(target=draining.server.stop, args=(SOON_S,))
        stopping.start()
        until(lambda: other.get("/readyz").status_code == 503)
        refused = other.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "being shut down" in refused.json()["error"]["message"]
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"stop"' in rest[-2]
        stopping.join(SOON_S)
        assert not stopping.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(draining.url + "/healthz")


def test_stop_ends_what_is_not_done_by_the_deadline_with_an_error(draining: Served):
    with lines_of(draining) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        stopping = threading.Thread(target=draining.server.stop, args=(0.1,))
        stopping.start()
        chunks = events("\n".join(lines))
        assert "being shut down" in chunks[-1]["error"]["message"]
        stopping.join(SOON_S)
        assert not stopping.is_alive() and draining.engine.load == 0


def test_a_lost_engine_ends_the_answers_with_an_error_and_may_come_back(tmp_path: Path):
    with served(slow(), tmp_path) as server, lines_of(server) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        waiting: list[httpx.Response] = []
        whole = threading.Thread(
            target=lambda: waiting.append(
                httpx.post(server.url + "/v1/chat/completions", json=CHAT, timeout=SOON_S)
            )
        )
        whole.start()
        until(lambda: server.engine.load == 2)
        server.engine.frontend.fail("rank 1 (mini2) is lost")
        chunks = events("\n".join(lines))
        assert "mini2" in chunks[-1]["error"]["message"]
        whole.join(SOON_S)
        assert waiting[0].status_code == 503 and "mini2" in waiting[0].text
        not_ready = server.client.get("/readyz")
        assert not_ready.status_code == 503 and "mini2" in not_ready.json()["reason"]
        assert server.client.get("/healthz").status_code == 200
        assert server.chat().status_code == 503
        server.engine.frontend.on_message(Ready(512, 2048, 4))
        until(lambda: server.client.get("/readyz").status_code == 200)


def test_an_answer_that_the_engine_gives_up_is_an_error(tmp_path: Path):
    with served(slow(), tmp_path) as server, lines_of(server) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        (submit,) = server.engine.submitted
        server.engine.give_up(submit.request, "out of memory")
        assert events("\n".join(lines))[-1]["error"]["message"] == "out of memory"


def test_a_port_that_is_taken_is_refused_and_its_owner_named():
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        server = HttpServer(lambda *_: None, Frontend(print), port=port)  # type: ignore[arg-type,return-value]
        with pytest.raises(OSError, match=rf"port {port}.*process \d+ .*serving.port"):
            server.start()
        server.stop(0.0)


def test_before_the_engine_is_ready_requests_are_refused(tmp_path: Path):
    with served(FakeEngine(echoes), tmp_path) as reference:
        service = reference.service
        frontend = Frontend(lambda *_: None)
        service.frontend = frontend
        server = HttpServer(build_app(service), frontend)
        with httpx.Client(base_url=server.start()) as client:
            assert client.get("/readyz").status_code == 503
            answer = client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
            assert "being loaded" in answer.json()["error"]["message"]
            assert client.get("/v1/models").status_code == 200
        server.stop(0.0)
