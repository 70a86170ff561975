"""Conversations written out by a chat template, with a loss mask over the answers in them.

A template renders the whole conversation and, for every answer, the text before it (with the
generation prompt) and the text up to its end. Where these are prefixes of the whole, the tokens
between them are the answer:

    whole     <user> Hi <end> <assistant> Hello! <end> \\n <user> ...
    before    <user> Hi <end> <assistant>
    through   <user> Hi <end> <assistant> Hello! <end> \\n
    loss_mask                             ^^^^^^ ^^^^^      up to the last end token
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from smolrun.data.template_limits import MAX_WORK, LimitedTemplate
from smolrun.data.token_file import MaskedTokens
from smolrun.data.tokenizer import NO_NAME, TextTokenizer
from smolrun.errors import DataError
from smolrun.files import read_json

Messages = list[dict[str, str]]

PLAIN = (
    "{%- for message in messages %}{{ message['role'] + ':\\n' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILE = "tokenizer_config.json"
_AT_ONCE = 64  # conversations: the tokenizer then has work for all cores


@dataclass(frozen=True)
class Conversation:
    """Messages, and where they come from, for errors."""

    messages: Messages
    where: str


class ChatTemplate:
    """The template of the tokenizer in a folder, after `choose_template` was there."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer) -> None:
        from transformers import AutoTokenizer  # seconds; only for data not yet kept

        try:
            writer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._names: dict[str, str] = writer.special_tokens_map
            texts = writer.get_chat_template(), writer.get_chat_template(tools=[{}])
            self._template = LimitedTemplate(texts[0])
            # Few models have a template of its own for that.
            differs = texts[0] != texts[1]
            self._with_tools = LimitedTemplate(texts[1]) if differs else self._template
        except Exception as error:  # whatever the library meets in a foreign folder
            raise DataError(
                f"cannot use the chat template of {folder}: {error}; set data.template=plain"
            ) from None
        self._tokenizer = tokenizer

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        asks: bool,
        names: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The conversation as text; `asks`: with the beginning of an answer that is to come.

        `names` are switches that a template of its own may read, such as enable_thinking; `tools`
        are functions as OpenAI's API describes them. LimitPassed for a template that does not come
        to an end.
        """
        texts = ("content", "reasoning_content")
        size = sum(len(message.get(name, "")) for message in messages for name in texts)
        calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
        size += len(json.dumps([tools, calls])) if tools or calls else 0
        return (self._with_tools if tools else self._template).render(
            MAX_WORK + 100 * size,
            messages=messages,
            tools=tools or None,
            documents=None,
            add_generation_prompt=asks,
            **{**names, **self._names},
        )

    def marked(self, conversations: Sequence[Conversation]) -> Iterator[MaskedTokens]:
        """Each conversation's tokens, those of answers marked, closed by an end token.

        Raises DataError naming the conversation and the message that the template cannot write.
        """
        for start in range(0, len(conversations), _AT_ONCE):
            some = conversations[start : start + _AT_ONCE]
            texts = [self._texts(conversation) for conversation in some]
            ids = iter(self._tokenizer.encode_markup([text for one in texts for text in one]))
            for conversation, one in zip(some, texts, strict=True):
                whole, *beginnings = [next(ids) for _ in one]
                is_answered = conversation.messages[-1]["role"] == "assistant"
                yield _masked(whole, beginnings, self._tokenizer.end_id, is_answered)

    def _texts(self, conversation: Conversation) -> list[str]:
        """The whole, then before and through of every answer."""
        messages, at = conversation.messages, 0
        try:
            whole = self.write(messages, asks=False)
            texts = [whole]
            for at, message in enumerate(messages):
                if at and message["role"] == "assistant":
                    texts.append(self.write(messages[:at], asks=True))
                    texts.append(self.write(messages[: at + 1], asks=False))
                    if not all(map(whole.startswith, texts[-2:])):
                        raise ValueError(
                            "within the whole conversation the template writes what is before this "
                            "answer, or the answer, in another way than by itself"
                        )
        except Exception as error:  # a template may raise what it likes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{conversation.where}, message {at + 1} ({messages[at]['role']}): the chat "
                f"template cannot write it: {reason}; correct it or set data.template=plain"
            ) from None
        return texts


def choose_template(folder: Path, template: str, tokenizer: TextTokenizer) -> None:
    """Write the template that `data.template` names into a tokenizer's folder, so that every later
    reader of the folder renders conversations alike.

    Raises DataError for a file that cannot be read.
    """
    settings_file = folder / _SETTINGS_FILE
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    start = ""
    if tokenizer.end_token == NO_NAME:
        # Hugging Face's tools would add it to the 256 tokens; as a mere character it is byte 0.
        start = "{%- set eos_token = '\\x00' %}"
    else:
        settings["eos_token"] = tokenizer.end_token
    if settings_file.is_file():
        try:
            settings |= read_json(settings_file)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"cannot read {settings_file}: {error}") from None
    has_own = bool(settings.get("chat_template")) or (folder / TEMPLATE_FILE).is_file()
    if template != "auto" or not has_own:
        settings.pop("chat_template", None)
        (folder / "chat_template.json").unlink(missing_ok=True)
        text = start + (template_text(template) or PLAIN)
        (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8")
    settings_file.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def template_text(template: str) -> str | None:
    """What `data.template` names; None for auto. Raises DataError for a file that is not there."""
    if template in ("auto", "plain"):
        return PLAIN if template == "plain" else None
    try:
        return Path(os.path.expanduser(template)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.template={template}: is not auto, not plain, and no file that can be read: "
            f"{error}"
        ) from None


def _masked(
    whole: list[int], beginnings: list[list[int]], end_id: int, is_answered: bool
) -> MaskedTokens:
    loss_mask = [False] * len(whole)
    is_closed = False
    for before, through in zip(beginnings[::2], beginnings[1::2], strict=True):
        # Tokens may join over the border, such as two line ends: then the answer begins with that.
        start, stop = _common(whole, before), _common(whole, through)
        ends = [at for at in range(start, stop) if whole[at] == end_id]
        stop = ends[-1] + 1 if ends else stop
        loss_mask[start:stop] = [True] * (stop - start)
        is_closed = bool(ends)
    if not (is_closed and is_answered):
        whole, loss_mask = [*whole, end_id], [*loss_mask, is_answered]
    return MaskedTokens.of(whole, loss_mask)


def _common(whole: list[int], beginning: list[int]) -> int:
    """How many tokens both begin with."""
    if whole[: len(beginning)] == beginning:
        return len(beginning)
    pairs = enumerate(zip(whole, beginning, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(whole), len(beginning)))
