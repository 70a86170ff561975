"""The client side of task=generate and task=chat: a conversation over HTTP, with a running server
(`serving.url`) or with one that this process starts for itself alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from smolrun.config import RunConfig
from smolrun.driver.serving import ServingRun
from smolrun.errors import ConfigError, SmolrunError
from smolrun.launch.supervisor_events import EXIT_STOPPED, RunOutcome
from smolrun.tracking.run_folder import RunFolder

Progress = Callable[[str, int, int], None]
Message = dict[str, str]
CUT = "the answer is cut, by serving.max_tokens or by the context of the model"
KEY_VARIABLE = "SMOLRUN_API_KEY"
_CONNECT_S = 10.0
_SILENCE_S = 60.0  # a server that lives sends a comment more often
_POLL_S = 0.1
_END_S = 30.0


class ConversationTooLong(SmolrunError):
    """The context of the model has no room for an answer."""


class ChatClient:
    """Asks one server. Errors of the connection and of the server are SmolrunError."""

    def __init__(self, url: str, model: str | None = None, **request_fields: float) -> None:
        """Asks which model is served, unless it is given. `request_fields`, such as temperature, go
        into every request; the server's defaults fill the rest."""
        self._url = url.rstrip("/").removesuffix("/v1")
        self._request_fields = request_fields
        key = os.environ.get(KEY_VARIABLE)
        self.was_cut = False  # the last answer, by serving.max_tokens or the context
        self._http = httpx.Client(
            timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S),
            headers={"authorization": f"Bearer {key}"} if key else {},
            trust_env=False,
        )
        self.model = model or self._served_model()

    def _served_model(self) -> str:
        with self._errors():
            response = self._http.get(f"{self._url}/v1/models")
            self._check(response)
            return str(response.json()["data"][0]["id"])

    def answer(self, messages: Sequence[Message]) -> Generator[tuple[str, bool], None, None]:
        """The pieces of an answer as they come, each with whether it is a thought. Closing the
        iterator cancels the answer."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            **self._request_fields,
        }
        place = f"{self._url}/v1/chat/completions"
        self.was_cut = False
        with self._errors(), self._http.stream("POST", place, json=body) as response:
            if response.is_error:
                response.read()
            self._check(response)
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    yield from _pieces(event)
                    ends = [choice.get("finish_reason") for choice in event["choices"]]
                    self.was_cut = self.was_cut or "length" in ends
            raise SmolrunError(f"{self._url} ended the answer without its end")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise SmolrunError(f"{self._url} does not answer: {what}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise SmolrunError(f"{self._url} does not answer as OpenAI's API: {error}") from error

    def _check(self, response: httpx.Response) -> None:
        """SmolrunError with what the server says is wrong."""
        if not response.is_error:
            return
        try:
            error = response.json()["error"]
            said, code = error["message"], error.get("code")
        except (ValueError, LookupError, TypeError, AttributeError):
            said, code = response.reason_phrase, None
        if code == "context_length_exceeded":
            raise ConversationTooLong(f"{self._url}: {said}")
        hint = f"; set {KEY_VARIABLE} to its API key" if response.status_code == 401 else ""
        raise SmolrunError(f"{self._url} answered {response.status_code}: {said}{hint}")


def _pieces(event: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    if "error" in event:
        raise SmolrunError(str(event["error"]["message"]))
    for choice in event["choices"]:
        delta = choice["delta"]
        if thought := delta.get("reasoning_content"):
            yield thought, True
        if text := delta.get("content"):
            yield text, False


@contextlib.contextmanager
def connected(
    config: RunConfig, say: Callable[[str], None], progress: Progress
) -> Iterator[ChatClient]:
    """A client of the server at `serving.url`, or of one that lives as long as the block."""
    serving = config.serving
    with contextlib.ExitStack() as closing:
        url, model = serving.url, None
        if url is None:
            url, model = closing.enter_context(_own_server(config, say, progress))
        asked = {"max_tokens": serving.max_tokens, "temperature": serving.temperature}
        request_fields = {key: value for key, value in asked.items() if value != "auto"}
        client = ChatClient(url, model, **request_fields)
        closing.callback(client.close)
        yield client


@contextlib.contextmanager
def _own_server(
    config: RunConfig, say: Callable[[str], None], progress: Progress
) -> Iterator[tuple[str, str]]:
    """A server of this process on a free port of this machine, on a thread of its own: Ctrl-C is
    the caller's. Gives its URL and the name of its model."""
    serving = config.serving.model_copy(update={"port": 0, "bind": "127.0.0.1"})
    config = config.model_copy(update={"serving": serving})
    with (
        _ended_by_signals(),
        tempfile.TemporaryDirectory(prefix="smolrun-", ignore_cleanup_errors=True) as place,
        ServingRun(config, say, progress) as run,
    ):
        folder = RunFolder.create(Path(place), config.task, now=datetime.now())
        ready = threading.Event()
        ended: list[RunOutcome | BaseException] = []

        def serve() -> None:
            try:
                ended.append(run.serve(folder, on_ready=lambda _: ready.set()))
            except BaseException as error:  # raised again by the thread that waits
                ended.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=serve, name="smolrun-serving", daemon=True)
        thread.start()
        try:
            while not ready.wait(_POLL_S):  # in short waits: Windows notices no Ctrl-C in long ones
                pass
            _raise_end(ended)
            yield run.url, run.source.name
            _raise_end(ended)
        finally:
            for _ in range(2):  # at once: nothing is to be saved
                with contextlib.suppress(OSError):
                    folder.ask_to_stop()
            thread.join(_END_S)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as an exception does: the server and its folder go
    first."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # nothing interrupts that
        raise SystemExit(EXIT_STOPPED)

    found = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [one for one in found if one and signal.getsignal(one) is not signal.SIG_IGN]
        before = {number: signal.signal(number, end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_end(ended: list[RunOutcome | BaseException]) -> None:
    """Raise what ended the server, if it has ended."""
    for end in ended:
        if isinstance(end, BaseException):
            raise end
        tail = "".join(f"\n| {line}" for line in end.log_tail)
        raise SmolrunError(f"{end.reason}{tail}")


def prompt_or_refuse(prompt: str | None, read: Callable[[], str], is_terminal: bool) -> str:
    """`generate.prompt`, else what is on stdin; ConfigError where there is neither."""
    if prompt is None and is_terminal:
        raise ConfigError('generate.prompt is missing: prompt="...", or the prompt on stdin')
    try:
        text = read() if prompt is None else prompt
        text.encode()
    except UnicodeError as error:
        raise ConfigError(f"generate.prompt is not UTF-8: {error}") from None
    if not text:
        raise ConfigError("generate.prompt is empty: there is nothing to answer")
    return text
