"""Conversations as they come: lines of a file or rows of a dataset, checked one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smolrun.data.chat_template import Conversation, Messages
from smolrun.data.prepared import Progress
from smolrun.errors import DataError

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
        raise DataError(f"{where}: is no object; {_FORM}")
    if record.get("messages") is not None:
        messages = record["messages"]
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = [
            *_side(record["prompt"], "user"),
            *_side(record["completion"], "assistant"),
        ]
    else:
        raise DataError(f"{where}: has {', '.join(map(str, record)) or 'no keys'}; {_FORM}")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: its messages are no list with something in it")
    return [_message(message, f"{where}, message {at + 1}") for at, message in enumerate(messages)]


def _side(value: Any, role: str) -> list[Any]:
    """A prompt or a completion: a text, or messages already."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f'{where}: is no {{"role": ..., "content": ...}}')
    kept = {}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DataError(f"{where}: its {key} is no text")
        # JSON can say half a character (\ud800), which no tokenizer takes.
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
    from smolrun.data.hub_dataset import open_dataset

    dataset: Any = open_dataset(path, subset, split, cache_dir=cache_dir, progress=progress)
    wanted = [name for name in ("messages", "prompt", "completion") if name in dataset.features]
    if "messages" not in wanted and wanted != ["prompt", "completion"]:
        there = ", ".join(dataset.features)
        raise DataError(f"data.path={path}: has the columns {there}; {_FORM}")
    for number, row in enumerate(dataset.select_columns(wanted)):
        if number % 500 == 0:
            progress("reading conversations", number, len(dataset))
        yield f"{path} row {number}", row
