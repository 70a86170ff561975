"""Reads JSON and YAML files of folders that others made, within limits on size and depth, so that
none of them fills the memory, blocks the process or ends it.

LimitPassed says which limit a file passes; the reader names the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

MAX_JSON_BYTES = 16 << 20  # config.json and the like have kilobytes, a large tokenizer_config 2 MB
MAX_TOKENIZER_BYTES = 128 << 20  # tokenizer.json: 33 MB for 262,000 tokens
MAX_YAML_BYTES = 1 << 20
MAX_DEPTH = 50  # libraries walk such values by recursion
MAX_YAML_NODES = 100_000  # aliases written out


class LimitPassed(ValueError):
    """A file is larger or deeper than any that is meant to be read, or not a regular file."""


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
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return found
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


def read_yaml(path: Path) -> bytes:
    """The bytes of a YAML file that may be decoded. OSError; ValueError for a file that is too
    large or too deep, or whose aliases, written out, are too many values."""
    data = read_bytes(path, MAX_YAML_BYTES)
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
