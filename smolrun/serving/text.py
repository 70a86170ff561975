"""Between text and token ids, for one server: prompts in, pieces of answers out.

    messages -> chat template -> ids        token -> bytes -> whole characters -> stop strings

A character that several tokens make up is released once it is complete. Text that may be the
beginning of a stop string waits until it is clear. Knows nothing of HTTP and of the engine.
"""

from __future__ import annotations

import codecs
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolrun.data.chat_template import ChatTemplate
from smolrun.data.tokenizer import load_tokenizer
from smolrun.errors import DataError
from smolrun.files import read_json

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
# Marks where the name of a control token that a user wrote is cut; random, so no text has it.
_BREAK = f"\ufdd0{secrets.token_hex(8)}\ufdd1"


@dataclass(frozen=True)
class TokenText:
    """A token of an answer: its bytes, its log-probability, and the likeliest ones in its place."""

    id: int
    bytes: bytes
    logprob: float | None = None
    top: list[TokenText] | None = None

    @property
    def text(self) -> str:
        """For people: bytes that are no whole character become U+FFFD."""
        return self.bytes.decode("utf-8", "replace")


def token_text(
    every: Sequence[bytes],
    id: int,
    logprob: float | None = None,
    top: Sequence[tuple[int, float]] | None = None,
) -> TokenText:
    """A token as the engine reports it. `every`: the bytes of every id."""
    if top is None:
        return TokenText(id, every[id], logprob)
    # A head may have rows beyond the tokens of the tokenizer.
    likeliest = [
        TokenText(other, every[other], value) for other, value in top if other < len(every)
    ]
    return TokenText(id, every[id], logprob, likeliest)


@dataclass
class Delta:
    """Text that is ready to be sent, and the tokens that it is made of."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)


class StopStrings:
    """Finds the stop string that is complete first, wherever the borders of the pieces are."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [text for text in strings if text]
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.is_found = False
        self.rest = ""  # what follows the stop string

    def push(self, text: str) -> str:
        """The text that can be released: up to a stop string, without what may begin one."""
        held = self._held + text
        ends = [
            (at + len(string), at) for string in self._strings if (at := held.find(string)) >= 0
        ]
        if ends:
            end, start = min(ends)
            self.is_found, self._held, self.rest = True, "", held[end:]
            return held[:start]
        keep = next(
            (
                size
                for size in range(min(len(held), self._longest - 1), 0, -1)
                if any(string.startswith(held[-size:]) for string in self._strings)
            ),
            0,
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, as the answer ends without a stop string."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """The text of one choice, token by token. `is_stopped()` once a stop string was found."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        stop: Sequence[str] = (),
        stop_ids: Collection[int] = (),
    ) -> None:
        """`token_bytes`: of every id, empty for a control token. Tokens in `stop_ids` are no text,
        as they end an answer."""
        self._token_bytes = token_bytes
        self._stop_ids = frozenset(stop_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = StopStrings(stop)
        self._waiting: list[tuple[TokenText, int, int]] = []  # with its first character and its end
        self._decoded = 0  # characters
        self._released = 0

    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.is_found

    def push(
        self, id: int, logprob: float | None = None, top: list[tuple[int, float]] | None = None
    ) -> Delta:
        """A new token; the text that is complete with it."""
        data = self._token_bytes[id] if id < len(self._token_bytes) else b""
        if not data or id in self._stop_ids:
            return Delta()
        token = token_text(self._token_bytes, id, logprob, top)
        start = self._decoded
        text = self._decoder.decode(token.bytes)
        self._decoded += len(text)
        is_partial = bool(self._decoder.getstate()[0])
        self._waiting.append((token, start, self._decoded + is_partial))
        return self._release(self._stop.push(text))

    def finish(self) -> Delta:
        """The rest: what waited for a stop string, but no part of a character."""
        return self._release("" if self.is_stopped() else self._stop.flush(), is_last=True)

    def _release(self, text: str, *, is_last: bool = False) -> Delta:
        self._released += len(text)
        if self.is_stopped():
            tokens = [token for token, start, _ in self._waiting if start < self._released]
            self._waiting = []
        elif is_last:
            tokens, self._waiting = [token for token, _, _ in self._waiting], []
        else:
            count = 0
            while count < len(self._waiting) and self._waiting[count][2] <= self._released:
                count += 1
            tokens = [token for token, _, _ in self._waiting[:count]]
            del self._waiting[:count]
        return Delta(text, tokens)


class ThinkingSplitter:
    """Divides an answer into what a model thinks, <think>...</think>, and what it says."""

    def __init__(self, *, is_thinking: bool) -> None:
        """`is_thinking`: the prompt has opened the block already."""
        self._end = StopStrings([THINK_END])
        self._is_thinking: bool | None = True if is_thinking else None  # None: not known yet
        self._begun = ""

    def push(self, text: str) -> tuple[str, str]:
        """(thought, said) of a piece of text."""
        if self._is_thinking is None:
            self._begun += text
            begun = self._begun.lstrip()
            if not begun or (len(begun) < len(THINK_START) and THINK_START.startswith(begun)):
                return "", ""
            self._is_thinking = begun.startswith(THINK_START)
            text = begun[len(THINK_START) :] if self._is_thinking else self._begun
        if not self._is_thinking:
            return "", text
        return self._thought(text)

    def _thought(self, text: str) -> tuple[str, str]:
        thought = self._end.push(text)
        if not self._end.is_found:
            return thought, ""
        self._is_thinking = False
        return thought, self._end.rest

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        if self._is_thinking is None:
            return "", self._begun
        return (self._end.flush(), "") if self._is_thinking else ("", "")


class Prompts:
    """Makes token ids of what clients send. Used by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds the tokenizer and, for a chat model, its template. DataError."""
        self.tokenizer = load_tokenizer(folder)
        self.special_tokens = self.tokenizer.special_tokens()
        hidden = set(self.special_tokens.values())
        # Once for all: the tokenizer must not be used by two threads at the same time.
        self.token_bytes = [
            b"" if id in hidden else self.tokenizer.token_bytes(id)
            for id in range(self.tokenizer.vocab_size)
        ]
        self.template = ChatTemplate(folder, self.tokenizer) if has_template(folder) else None
        self.lacks_tools = _without_tools(template_source(folder))
        self.thinks = self.template is not None and THINK_END in template_source(folder)
        names = sorted(self.tokenizer.role_markers(), key=len, reverse=True)
        # A match has no length, so that names that overlap are all found.
        self._names = re.compile(f"(?=({'|'.join(map(re.escape, names))}))") if names else None

    def text(self, text: str) -> list[int]:
        """The ids of a plain text that is to be continued."""
        return self.tokenizer.encode_prompt(text) or [self.tokenizer.end_id]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        names: Mapping[str, Any],
        begun: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[list[int], bool]:
        """The ids of a conversation, and whether the answer begins within a <think> block.

        `begun`: the beginning of the answer, which is to be continued. The name of a control token
        in a message stays text. A model without a template continues the messages as text.
        DataError where the template refuses them.
        """
        if self.template is None:
            text = "\n".join(message["content"] for message in messages)
            return self.text(text + (begun or "")), False
        messages, names, tools = map(self._all_broken, ([*messages], dict(names), [*tools]))
        try:
            text = self.template.write(messages, asks=True, names=names, tools=tools)
        except Exception as error:  # a template may raise what it likes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"the model's chat template refuses these messages: {reason}") from None
        is_thinking = text.rstrip().endswith(THINK_START)
        if begun is not None:
            # What was said comes after what was thought, which is no part of the message.
            text += f"\n{THINK_END}\n\n" * is_thinking + self._broken(begun)
            is_thinking = False
        ids = self.tokenizer.encode_markup(text.split(_BREAK))
        return [id for part in ids for id in part], is_thinking

    def _all_broken(self, value: Any) -> Any:
        """As `_broken`, of every text in a JSON value."""
        if isinstance(value, str):
            return self._broken(value)
        if isinstance(value, list):
            return [self._all_broken(item) for item in value]
        if isinstance(value, dict):
            return {self._broken(key): self._all_broken(item) for key, item in value.items()}
        return value

    def _broken(self, text: str) -> str:
        """With a mark within the name of every control token, where the text is to be cut."""
        if self._names is None or not self._names.search(text):
            return text
        places = [match.start() + 1 for match in self._names.finditer(text)]
        parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        return _BREAK.join(parts)


def _without_tools(template: str) -> str:
    """Why a model with this chat template cannot be given tools; empty if it can."""
    if not re.search(r"\btools\b", template):
        return "this model has no tools in its chat template, so it cannot call functions"
    if CALL_START not in template or "<function=" in template:
        return (
            f"this model writes calls of functions in a format other than {CALL_START} and JSON "
            "(Hermes, Qwen2.5, Qwen3), which this server does not read"
        )
    return ""


def has_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder comes with a chat template."""
    return bool(template_source(folder))


def template_source(folder: Path) -> str:
    """The text of the chat template in a folder, of all its variants; empty if there is none."""
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    return str(read_json(settings).get("chat_template") or "") if settings.is_file() else ""
