"""Conversations as training data: a model learns what the assistant answers, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, cached
from smolrun.data.chat_template import (
    ChatTemplate,
    Conversation,
    Messages,
    choose_template,
    template_text,
)
from smolrun.data.hub_dataset import open_dataset
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.data.token_file import check_numbers, pack_rows
from smolrun.data.tokenizer import Encoder, encoder_for
from smolrun.errors import DataError

_PARTS = ("train", "eval")


@dataclass
class Chat:
    """Conversations of a file or a dataset; conf/data/chat.yaml explains the keys."""

    produces: ClassVar[Kind] = "tokens"

    cache_dir: Path
    _: KW_ONLY
    path: str
    subset: str | None
    split: str
    eval_fraction: float
    template: str
    tokenizer: str
    vocab_size: int
    sequence_length: int
    packing: bool
    max_mb: float | None

    def prepare(self, progress: Progress) -> Prepared:
        """Reads, writes out, marks and keeps the conversations; raises DataError for bad ones."""
        check_numbers(self.sequence_length, self.eval_fraction)
        encoder = encoder_for(self.tokenizer, self.vocab_size, progress)
        found = read_conversations(
            self.path,
            self.subset,
            self.split,
            self.max_mb,
            cache_dir=self.cache_dir,
            progress=progress,
        )
        # Conversations by their hashes: the last ones are a fair mix of all, and one that is there
        # twice is not in both parts (but for one pair at the border).
        hashes = {hashlib.sha256(_json(one)).hexdigest() + one.where: one for one in found}
        ordered = [hashes[key] for key in sorted(hashes)]
        key = {
            "conversations": hashlib.sha256(b"\n".join(map(_json, ordered))).hexdigest(),
            "template": template_text(self.template),
            "eval_fraction": self.eval_fraction,
            "sequence_length": self.sequence_length,
            "packing": self.packing,
            **encoder.key,
        }
        entry = cached(
            self.cache_dir,
            "chat",
            key,
            lambda folder: self._write(folder, ordered, encoder, progress),
        )
        facts = entry.facts
        return Prepared(
            kind="tokens",
            path=str(entry.data_path),
            sha256=entry.sha256,
            num_outputs=facts["vocab_size"],
            num_inputs=None,
            sequence_length=self.sequence_length,
            tokenizer=str(entry.folder),
            train_size=facts["train"],
            eval_size=facts["eval"],
            description=_describe(len(found), encoder.name, facts),
            masked=True,
        )

    def _write(
        self, folder: Path, ordered: Sequence[Conversation], encoder: Encoder, progress: Progress
    ) -> dict[str, Any]:
        """Fill a new cache entry; returns its facts."""
        if len(ordered) < 2:
            raise DataError(f"data.path={self.path}: one conversation is too few, some are kept")
        border = min(len(ordered) - 1, max(1, round(len(ordered) * (1 - self.eval_fraction))))
        parts = dict(zip(_PARTS, (ordered[:border], ordered[border:]), strict=True))
        contents = [message["content"] + "\n" for one in parts["train"] for message in one.messages]
        tokenizer = encoder.make(folder, contents)
        choose_template(folder, self.template, tokenizer)
        template = ChatTemplate(folder, tokenizer)
        width = self.sequence_length + 1
        facts: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "cut": 0, "left_out": 0}
        tensors: dict[str, Any] = {}
        done = answer_tokens = 0
        for part, conversations in parts.items():
            kept = []
            for document in template.marked(conversations):
                progress("writing conversations", done, len(ordered))
                done += 1
                short = document.cut(width)
                if short.loss_mask.any():
                    kept.append(short)
                    facts["cut"] += len(short) < len(document)
                    answer_tokens += int(short.loss_mask.sum())
                else:
                    facts["left_out"] += 1
            if not kept:
                raise self._nothing_to_learn(part)
            rows = pack_rows(
                kept,
                width,
                end_id=tokenizer.end_id,
                vocab_size=tokenizer.vocab_size,
                packing=self.packing,
            )
            tensors |= rows.tensors(part)
            facts[part] = len(rows)
        progress("writing conversations", len(ordered), len(ordered))
        save_file(tensors, folder / DATA_FILE)
        return {**facts, "answer_tokens": answer_tokens}

    def _nothing_to_learn(self, part: str) -> DataError:
        return DataError(
            f"data.path={self.path}: no conversation of the {part} part has an answer of an "
            f"`assistant` within its first {self.sequence_length} tokens; raise "
            "data.sequence_length, or look at the roles"
        )


def _describe(count: int, tokenizer: str, facts: dict[str, Any]) -> str:
    text = (
        f"chat: {count:,} conversations, {facts['train']:,} train and {facts['eval']:,} eval "
        f"samples, {facts['answer_tokens']:,} tokens of answers, {tokenizer} tokenizer of "
        f"{facts['vocab_size']}"
    )
    if facts["cut"]:
        text += f"; {facts['cut']:,} were longer than a sample and cut"
    if facts["left_out"]:
        text += f"; {facts['left_out']:,} left out, because no answer is within the first sample"
    return text


def _json(conversation: Conversation) -> bytes:
    return json.dumps(conversation.messages, sort_keys=True).encode()


_LINES = (".jsonl", ".ndjson")
_FORM = (
    'expected {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]} or '
    '{"prompt": "...", "completion": "..."}'
)


def read_conversations(
    path: str,
    subset: str | None,
    split: str,
    max_mb: float | None,
    *,
    cache_dir: Path,
    progress: Progress,
) -> list[Conversation]:
    """All conversations, or the first `max_mb` of them (10^6 bytes of UTF-8).

    Raises DataError that names the file and line, or the row, of what is not one.
    """
    file = Path(os.path.expanduser(path))
    if file.is_file() and file.suffix in _LINES:
        records = _lines(file, progress)
    else:
        records = _rows(path, subset, split, cache_dir, progress)
    room = None if max_mb is None else int(max_mb * 1e6)
    found: list[Conversation] = []
    for where, record in records:
        conversation = Conversation(messages_of(record, where), where)
        found.append(conversation)
        if room is not None:
            texts = (message["content"] for message in conversation.messages)
            room -= sum(len(text.encode()) for text in texts)
            if room <= 0:
                break
    progress("reading conversations", 1, 1)
    if not found:
        raise DataError(f"data.path={path}: there is no conversation; {_FORM} a line")
    return found


def messages_of(record: Any, where: str) -> Messages:
    """The messages of one record; raises DataError naming what is wrong with it."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: is not an object; {_FORM}")
    if record.get("messages") is not None:
        messages = record["messages"]
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = [*_side(record["prompt"], "user"), *_side(record["completion"], "assistant")]
    else:
        raise DataError(f"{where}: has {', '.join(map(str, record)) or 'no keys'}; {_FORM}")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: its messages are not a list, or an empty one")
    return [_message(message, f"{where}, message {at + 1}") for at, message in enumerate(messages)]


def _side(value: Any, role: str) -> list[Any]:
    """A prompt or a completion: a text, or messages already."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f'{where}: is not {{"role": ..., "content": ...}}')
    kept = {}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DataError(f"{where}: its {key} is not text")
        # JSON can encode half a character (\ud800), which no tokenizer takes.
        kept[key] = message[key].encode(errors="replace").decode()
    if not kept["role"].strip():
        raise DataError(f"{where}: its role is empty")
    return kept


def _lines(file: Path, progress: Progress) -> Iterator[tuple[str, Any]]:
    try:
        size, done = file.stat().st_size, 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if number % 500 == 1:
                    progress("reading conversations", min(done, size), size)
                done += len(line)
                if line.strip():
                    where = f"{file} line {number}"
                    yield where, _parsed(line.removeprefix(b"\xef\xbb\xbf"), where)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:  # it counts lines too, but sees one only
        raise DataError(f"{where}: is not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8
        raise DataError(f"{where}: is not valid JSON: {error}") from None


def _rows(
    path: str, subset: str | None, split: str, cache_dir: Path, progress: Progress
) -> Iterator[tuple[str, Any]]:
    dataset: Any = open_dataset(path, subset, split, cache_dir=cache_dir, progress=progress)
    wanted = [name for name in ("messages", "prompt", "completion") if name in dataset.features]
    if "messages" not in wanted and wanted != ["prompt", "completion"]:
        there = ", ".join(dataset.features)
        raise DataError(f"data.path={path}: has the columns {there}; {_FORM}")
    for number, row in enumerate(dataset.select_columns(wanted)):
        if number % 500 == 0:
            progress("reading conversations", number, len(dataset))
        yield f"{path} row {number}", row
