"""A whole HTTP server over a FakeEngine, for the tests of the API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from smolrun.data.tokenizer import bytes_tokenizer
from smolrun.serving.api import build_app
from smolrun.serving.generation import Service
from smolrun.serving.http_server import HttpServer
from smolrun.serving.messages import Submit
from smolrun.serving.text import Prompts
from tests.serving.fake_engine import FakeEngine, Script
from tests.waiting import SOON_S


def says(text: str) -> Script:
    """The script of an engine that answers every request with one text; a byte is a token."""
    return lambda submit, choice: [*text.encode(), 0]


def echoes(submit: Submit, choice: int) -> Sequence[int]:
    """The script of an engine that answers with the prompt."""
    return [*submit.prompt_ids, 0]


@dataclass
class Served:
    """A running server."""

    url: str
    engine: FakeEngine
    service: Service
    server: HttpServer

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SOON_S)

    def chat(self, content: str = "Hi", **fields: object) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": content}], **fields}
        with self.client as client:
            return client.post("/v1/chat/completions", json=body)


@contextmanager
def served(engine: FakeEngine, folder: Path) -> Iterator[Served]:
    """A server for one test, on a free port; its tokenizer has a token for each byte."""
    bytes_tokenizer().save(folder)
    service = Service("fake", Prompts(folder), engine.frontend, stop_ids=[0])
    server = HttpServer(build_app(service), engine.frontend, host="127.0.0.1", port=0)
    url = server.start()
    engine.start()
    try:
        yield Served(url, engine, service, server)
    finally:
        server.stop(drain_s=0.0)
        service.close()
        engine.stop()
