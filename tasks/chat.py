"""task=chat: a conversation with a model in this terminal.

Ctrl-C ends the answer that is being written; /exit or Ctrl-D (on Windows Ctrl-Z and Enter) ends the
conversation.
"""

from __future__ import annotations

import contextlib
import sys

from smolrun.config import RunConfig
from smolrun.driver.serving_client import (
    CUT,
    ChatClient,
    ConversationTooLong,
    Message,
    connected,
)
from smolrun.errors import SmolrunError
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_STOPPED
from smolrun.sanitize import echo, printable
from smolrun.tracking.console import Console

_EXITS = ("/exit", "/quit", "/bye", "exit", "quit")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def drive(config: RunConfig) -> int:
    """Talk until the end of stdin; returns the exit code. ConfigError, HostError: nothing was
    started."""
    console = Console(steps=1, world_size=1, stream=sys.stderr)
    try:
        with connected(config, console.say, console.preparing) as client:
            console.say(f"{client.model}: Ctrl-C ends an answer, /exit the conversation")
            console.close()
            TerminalChat(client, config.chat.system).hold()
    except KeyboardInterrupt:
        return EXIT_STOPPED
    finally:
        console.close()
    return EXIT_DONE


class TerminalChat:
    """Turns of the user and of the model, by stdin and stdout."""

    def __init__(self, client: ChatClient, system: str | None) -> None:
        self._client = client
        self._messages: list[Message] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})
        self._is_dim = False

    def hold(self) -> None:
        """Until the end of stdin."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # editing and history of lines; not on Windows
                import readline  # noqa: F401
        else:  # bytes that are no text are refused line by line
            with contextlib.suppress(AttributeError):  # a stdin of a test
                sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        while (text := self._read()) is not None and text.strip() not in _EXITS:
            try:
                text.encode()
            except UnicodeError:
                echo(f"smolrun: a line that is not {sys.stdin.encoding} is not sent", error=True)
                continue
            if text.strip():
                self._turn(text)

    def _read(self) -> str | None:
        """What the user says next; None at the end. Ctrl-C empties the line."""
        while True:
            try:
                return input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                echo()

    def _turn(self, text: str) -> None:
        """One answer. A question that could not be answered is forgotten; a conversation that is
        too long for the model begins anew with it."""
        try:
            self._answer(text)
        except ConversationTooLong as error:
            earlier = [said for said in self._messages if said["role"] != "system"]
            if not earlier:
                echo(f"smolrun: {error}", error=True)
                return
            self._messages = [said for said in self._messages if said["role"] == "system"]
            echo("the model has no room for more of this conversation; it begins anew", error=True)
            self._turn(text)

    def _answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        said = ""
        try:
            with contextlib.closing(self._client.answer(self._messages)) as answer:
                for piece, is_thought in answer:
                    said += "" if is_thought else piece
                    self._show(piece, is_thought)
        except KeyboardInterrupt:
            self._show(" ...", False)
        except ConversationTooLong:
            self._messages.pop()
            raise
        except SmolrunError as error:
            self._messages.pop()
            echo(f"\nsmolrun: {error}", error=True)
            return
        self._show("\n", False)
        if self._client.was_cut:
            echo(f"smolrun: {CUT}", error=True)
        self._messages.append({"role": "assistant", "content": said})

    def _show(self, text: str, is_thought: bool) -> None:
        """Thoughts are dim, where the terminal can do that."""
        mark = ""
        if is_thought != self._is_dim and sys.stdout.isatty():
            mark = _DIM if is_thought else f"{_PLAIN}\n"
        self._is_dim = is_thought
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(mark + printable(text).encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
