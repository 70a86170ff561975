"""A whole HTTP server over a FakeEngine, for the tests of the API."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from smolrun.data.tokenizer import FILE_NAME, bytes_tokenizer
from smolrun.serving.access import AccessPolicy
from smolrun.serving.api import build_app
from smolrun.serving.generation import Service
from smolrun.serving.http_connection import ConnectionLimits
from smolrun.serving.http_server import HttpServer
from smolrun.serving.messages import Submit
from smolrun.serving.text import Prompts
from tests.serving.fake_engine import FakeEngine, Script
from tests.waiting import SOON_S, until


def says(text: str, end: int = 0) -> Script:
    """The script of an engine that answers every request with one text; a byte is a token."""
    return lambda submit, choice: [*text.encode(), end]


def echoes(submit: Submit, choice: int) -> Sequence[int]:
    """The script of an engine that answers with the prompt."""
    return [*submit.prompt_ids, 0]


@dataclass
class Served:
    """A running server, and a client of it."""

    url: str
    engine: FakeEngine
    service: Service
    server: HttpServer
    client: httpx.Client

    def chat(self, content: str = "Hi", **fields: object) -> httpx.Response:
        """A request for a chat completion."""
        body = {"model": "fake", "messages": [{"role": "user", "content": content}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: object = "Hi", **fields: object) -> httpx.Response:
        """A request for a text completion."""
        body = {"model": "fake", "prompt": prompt, **fields}
        return self.client.post("/v1/completions", json=body)

    def is_at_rest(self) -> bool:
        """Whether neither engine nor frontend knows any request."""
        return self.engine.load == 0 and self.service.frontend.num_requests == 0

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def connected(self) -> socket.socket:
        """A plain connection, whose waits have a deadline."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=SOON_S)


@contextmanager
def served(
    engine: FakeEngine,
    folder: Path,
    policy: AccessPolicy | None = None,
    limits: ConnectionLimits | None = None,
    request_timeout_s: float = 600.0,
    history: Path | None = None,
    compare_with: Sequence[str] = (),
) -> Iterator[Served]:
    """A server for a test, on a free port; where the folder has none, its tokenizer has a token
    for each byte, and byte 0 ends a text."""
    if not (folder / FILE_NAME).exists():
        bytes_tokenizer().save(folder)
    prompts = Prompts(folder)
    stop_ids = [prompts.tokenizer.end_id]
    service = Service(
        "fake",
        prompts,
        engine.frontend,
        stop_ids,
        request_timeout_s=request_timeout_s,
        history=history,
        compare_with=compare_with,
    )
    app = build_app(service, policy or AccessPolicy())
    server = HttpServer(app, engine.frontend, limits=limits)
    url = server.start()
    engine.start()
    client = httpx.Client(base_url=url, timeout=SOON_S, verify=False)
    try:
        until(lambda: client.get("/readyz").status_code == 200)
        yield Served(url, engine, service, server, client)
    finally:
        client.close()
        server.stop(drain_s=0.0)
        service.close()
        engine.stop()


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream of OpenAI's API, which must end with [DONE]."""
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]
