"""Whatever is sent, the answer is a 4xx in OpenAI's shape that names the field; never a 500."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolrun.serving.access import AccessPolicy
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, echoes, served
from tests.waiting import until

USER = {"role": "user", "content": "Hi"}
CHAT = {"model": "fake", "messages": [USER]}
TEXT = {"model": "fake", "prompt": "Hi"}
KEY = "secret-key"


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    policy = AccessPolicy(max_body_bytes=1 << 20, hosts=["served.example"])
    with served(FakeEngine(echoes), tmp_path_factory.mktemp("echo"), policy) as server:
        yield server
        # After all of this it still answers, and nothing of it is left.
        assert server.chat().status_code == 200
        until(server.is_at_rest)


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer, after its shape was checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return dict(error)


WRONG = [
    ({"model": 5}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [None]}, "messages[0]"),
    ({"messages": [USER] * 5000}, "messages"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages[0].content[0].type",
    ),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"65": 101}}, "logit_bias.65"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 10**30}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 10_000}, "stop"),
    ({"stop": 5}, "stop"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 10**6}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**40}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": 1}, "stream_options"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
        "tool_choice",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.json_schema.schema",
    ),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs.x"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_of_a_chat_is_named(echo: Served, fields: dict[str, Any], param: str):
    before = len(echo.engine.submitted)
    for stream in ({}, {"stream": True}):
        error = error_of(echo.client.post("/v1/chat/completions", json=CHAT | stream | fields), 400)
        assert error["param"] == param and param.partition("[")[0].partition(".")[0] in str(error)
        assert error["type"] == "invalid_request_error" and error["code"]
    assert len(echo.engine.submitted) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": "yes"}, "echo"),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_completion_is_named(echo: Served, fields: dict[str, Any], param: Any):
    error = error_of(echo.client.post("/v1/completions", json=TEXT | fields), 400)
    assert param is None or error["param"] == param


def test_a_field_that_is_required_is_named(echo: Served):
    error = error_of(echo.client.post("/v1/chat/completions", json={"model": "fake"}), 400)
    assert error["param"] == "messages" and error["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"null", b"[]", b'"text"', b"5", b"{} {}", b"\xff\xfe", b'{"model": "\xff"}'),
        b'{"model": "fake", "messages": [{"role": "user", "content": "\xc3"}]}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "a"}], "seed": NaN}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1, "n": 0}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b"a=b&c=d",
    ],
    ids=lambda body: str(body[:40]),
)
def test_a_body_that_is_no_valid_json_is_refused(echo: Served, body: bytes):
    for path in ("/v1/chat/completions", "/v1/completions", "/chat", "/query"):
        error_of(echo.client.post(path, content=body), 400)


def test_json_under_any_content_type_is_understood(echo: Served):
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        answer = echo.client.post(
            "/v1/chat/completions",
            content=b'{"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}',
            headers={"content-type": kind},
        )
        assert answer.status_code == 200


def test_fields_that_are_not_known_are_ignored(echo: Served):
    answer = echo.chat(service_tier="auto", metadata={"a": "b"}, something_of_another_server=[1])
    assert answer.status_code == 200
    assert echo.chat(tools=[], tool_choice="none", response_format={"type": "text"}).is_success


def test_an_unknown_model_is_404(echo: Served):
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        error = error_of(echo.client.post(path, json=body | {"model": "gpt-4o"}), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"


def test_a_prompt_that_is_longer_than_the_context_is_refused(echo: Served):
    for size in (512, 5000, 500_000):
        error = error_of(echo.chat("a" * size), 400)
        assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
        assert "512" in error["message"]
        assert error_of(echo.complete("a" * size), 400)["param"] == "prompt"
    assert echo.chat("a" * 511).json()["usage"]["completion_tokens"] == 1


def test_a_body_of_10_mb_is_refused_however_it_is_sent(echo: Served):
    body = b"x" * (10 << 20)
    error_of(echo.client.post("/v1/chat/completions", content=body), 413)
    chunks = (body[at : at + 65536] for at in range(0, len(body), 65536))
    error = error_of(echo.client.post("/v1/chat/completions", content=chunks), 413)
    assert error["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/moderations", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "//etc/passwd", 404),
        ("GET", "/page.html/../../../pyproject.toml", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/%ff%fe", 404),
        ("OPTIONS", "/v1/models", 405),
        ("TRACE", "/", 405),
    ],
)
def test_paths_and_methods_that_are_not_there(echo: Served, method: str, path: str, status: int):
    with echo.connected() as connection:
        request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert b'"error":{"message":' in body


def test_a_405_names_all_methods_of_its_path(echo: Served):
    answer = echo.client.put("/v1/streams/0123456789abcdef")
    assert answer.status_code == 405 and answer.headers["allow"] == "DELETE, GET"
    assert echo.client.delete("/v1/models").headers["allow"] == "GET"


def received(connection: socket.socket) -> bytes:
    """All until the other side closes."""
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda data: str(data[:40]),
)
def test_what_is_no_http_is_answered_by_an_error(echo: Served, request_bytes: bytes):
    with echo.connected() as connection:
        connection.sendall(request_bytes)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 4") and b'"code":"invalid_http"' in answer


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1234", 200),
        ("[::1]:80", 200),
        ("SERVED.example:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("", 403),
    ],
)
def test_a_foreign_host_gets_nothing(echo: Served, host: str, status: int):
    for path in ("/v1/models", "/healthz", "/"):
        answer = echo.client.get(path, headers={"host": host})
        assert answer.status_code == status
    if status != 200:
        assert error_of(answer, 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", ""])
def test_a_foreign_origin_gets_nothing(echo: Served, origin: str):
    before = len(echo.engine.submitted)
    answer = echo.client.post("/v1/chat/completions", json=CHAT, headers={"origin": origin})
    assert error_of(answer, 403)["code"] == "origin_not_allowed"
    assert not any(name.startswith("access-control") for name in answer.headers)
    asked = echo.client.options("/v1/chat/completions", headers={"origin": origin})
    assert asked.status_code == 403
    assert len(echo.engine.submitted) == before
    own = echo.client.get("/v1/models", headers={"origin": echo.url})
    assert own.status_code == 200


def test_a_listed_origin_may_ask(tmp_path: Path):
    page = "https://page.example"
    with served(FakeEngine(echoes), tmp_path, AccessPolicy(origins=[page])) as server:
        asked = server.client.options(
            "/v1/chat/completions",
            headers={
                "origin": page,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,x-stainless-os",
            },
        )
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == page
        allowed = asked.headers["access-control-allow-headers"]
        assert allowed == "authorization,x-stainless-os"  # as OpenAI's client in a browser sends
        answer = server.client.post("/v1/chat/completions", json=CHAT, headers={"origin": page})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        refused = server.client.get("/v1/models", headers={"origin": "https://other.example"})
        assert refused.status_code == 403


def test_without_the_key_there_is_no_answer(tmp_path: Path):
    with served(FakeEngine(echoes), tmp_path, AccessPolicy(api_key=KEY)) as server:
        for given in (None, "", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer \xfcber"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/config", "/nothing"):
                answer = server.client.get(path, headers=headers)
                assert error_of(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            answer = server.client.post("/chat", content=b"x" * 100, headers=headers)
            assert error_of(answer, 401)
        for path in ("/", "/healthz", "/readyz", "/docs", "/health"):
            assert server.client.get(path).status_code == 200
        right = {"authorization": f"bearer {KEY}"}
        assert server.client.get("/v1/models", headers=right).status_code == 200
