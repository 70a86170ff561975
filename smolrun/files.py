"""Files: atomic replacement, and bounded reads of JSON and YAML that others wrote.

The limits on size and depth keep a hostile file from filling the memory, blocking the process or
ending it. LimitPassed says which limit was passed; the caller names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

MAX_JSON_BYTES = 16 << 20  # config.json and the like have kilobytes, a large tokenizer_config 2 MB
MAX_TOKENIZER_BYTES = 128 << 20  # tokenizer.json: 33 MB for 262,000 tokens
MAX_YAML_BYTES = 1 << 20
MAX_DEPTH = 50  # libraries walk such values by recursion
MAX_YAML_NODES = 100_000  # aliases written out
# Windows refuses to replace a file that a virus scanner or an indexer has open; they are brief.
_ATTEMPTS = 20 if os.name == "nt" else 1
_REPLACE_PAUSE_S = 0.05


class LimitPassed(ValueError):
    """A file is larger or deeper than any that is meant to be read, or not a regular file."""


def to_null_device(descriptor: int) -> None:
    """Makes a descriptor one of the null device: it reads nothing, and what is written is gone."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)


def atomic_write(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Replace the content of `path` by `data`; as `atomic_writer`."""
    with atomic_writer(path, mode=mode) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_writer(path: Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """An empty file that replaces `path` at the end of the block, or is removed on an exception.

    A reader sees the old content or the whole new one, also after a power cut: the temporary file
    `.NAME.XXXXXXXX.part` beside `path` is synced before it is renamed. A symbolic link at `path` is
    replaced, not followed. `mode` sets the permission bits; None leaves them to the umask. OSError.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        # "x": never through a link that is there already
        with open(part, "xb", opener=_private if mode is not None else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            part.chmod(mode)
        _replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _replace(part: Path, path: Path) -> None:
    for left in reversed(range(_ATTEMPTS)):
        try:
            os.replace(part, path)
        except PermissionError:
            if not left:
                raise
            time.sleep(_REPLACE_PAUSE_S)
        else:
            break


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex. OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds. OSError; ValueError for a file that is too large, too deep or not
    JSON."""
    return decode_json(read_bytes(path, max_bytes))


def decode_json(data: bytes) -> Any:
    """What JSON text holds; ValueError as in `read_json`."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise LimitPassed(f"nested deeper than {MAX_DEPTH} levels") from None
    return not_too_deep(found)


def not_too_deep(value: Any) -> Any:
    """The JSON value itself; ValueError where it is nested deeper than MAX_DEPTH levels."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise LimitPassed(f"nested deeper than {MAX_DEPTH} levels")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A file's bytes. OSError; ValueError for more than `max_bytes`, and as `open_regular`."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise LimitPassed(f"larger than {max_bytes >> 20} MiB, the limit of such a file")
    return data


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading; links are followed. OSError; ValueError for a FIFO, whose
    opening would block, and for a device, which may have no end."""
    file = open(path, "rb", opener=_open_without_blocking)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LimitPassed("not a regular file")
    return file


def _open_without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_yaml(path: Path, max_bytes: int = MAX_YAML_BYTES) -> bytes:
    """The bytes of a YAML file that may be decoded. OSError; ValueError for a file that is too
    large or too deep, or whose aliases, written out, are too many values."""
    data = read_bytes(path, max_bytes)
    try:
        root = yaml.compose(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if root is not None and _count(root, {}) > MAX_YAML_NODES:
            raise LimitPassed(f"its aliases stand for more than {MAX_YAML_NODES:,} values")
    except RecursionError:
        raise LimitPassed("nested too deep, or an alias that contains itself") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return data


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, those of an alias each time that it is used."""
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [item for pair in node.value for item in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]
