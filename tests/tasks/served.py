"""Servers as a user starts them, on a small random chat model; never left behind by a test."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.models import model_folders
from tests.serving.chat_model import chat_model
from tests.tasks.background import process_of
from tests.tasks.test_whole_runs import finish, is_alive, start
from tests.waiting import SOON_S, until

START_S = 90.0  # imports of three processes, on a machine with other work
# Long enough to be looked at: thousands of tokens, none of which ends the text.
LONG: dict[str, Any] = {"stream": True, "max_tokens": 8000, "logit_bias": {"256": -100}}


def model_in(folder: Path) -> Path:
    """A model of 4 layers that reads 8192 bytes, with the tokenizer of a chat model."""
    model_folders.save_model(
        folder,
        "llama",
        vocab_size=258,
        num_hidden_layers=4,
        max_position_embeddings=8192,
        eos_token_id=256,
    )
    chat_model(folder)
    return folder


class Server:
    """One `smolrun task=serve` in a folder."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self._process = start(folder, "task=serve", *overrides)
        self.driver = psutil.Process(self._process.pid)
        self._outputs = folder / "outputs"
        self._earlier = {*self._outputs.glob("2*")}
        until(lambda: self.summary().get("status") == "serving" or not self.runs(), START_S)
        assert self.runs(), self.end()
        self.url = str(self.summary()["url"])
        self.workers = self.driver.children()

    @property
    def run(self) -> Path:
        """Its folder."""
        return min({*self._outputs.glob("2*")} - self._earlier)

    def runs(self) -> bool:
        return self._process.poll() is None

    def summary(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def body(self, **fields: object) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Hi"}]
        return {"model": self.summary()["model"], "messages": messages, **fields}

    @contextlib.contextmanager
    def stream(self, **fields: object) -> Iterator[Iterator[str]]:
        """The lines of a streamed answer."""
        body = self.body(**{**LONG, **fields})
        with (
            httpx.Client(timeout=SOON_S) as client,
            client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response,
        ):
            assert response.status_code == 200, response.read()
            yield response.iter_lines()

    def worker(self, rank: int) -> psutil.Process:
        return process_of(rank, self.run)

    def end(self) -> tuple[int, str, str]:
        """Exit code and output, once it has ended by itself."""
        return finish(self._process, 60)

    def is_gone(self) -> bool:
        """Whether no process of it is left."""
        return not any(is_alive(process) for process in (self.driver, *self.workers))

    def close(self) -> None:
        if self.runs():
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            self._process.communicate(timeout=10)


@contextlib.contextmanager
def serving(folder: Path, *overrides: str) -> Iterator[Server]:
    """A server, ended at the latest with the block."""
    server = Server(folder, *overrides)
    try:
        yield server
    finally:
        server.close()


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream; fails where it ends without [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")
