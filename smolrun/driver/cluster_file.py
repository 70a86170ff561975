"""Changes keys of single hosts in the text of a cluster file; all else stays as it is. Pure.

The file is the user's: its comments, order and style are kept, only values change. Their
places are those of the YAML parser, so any way to write a list of hosts works.

    - {name: mini1, ssh: mini1.local}     ->   - {name: mini1, ssh: mini1.local, os: darwin}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from smolrun.errors import ConfigError

# Words that YAML reads as they stand; any other gets quotes.
_PLAIN = re.compile(
    r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[a-z][a-z0-9._@-]*", re.IGNORECASE | re.ASCII
)
_NUMBER = re.compile(r"\d+(\.\d+){3}")  # an IPv4 address is no number to YAML


def changed(text: str, hosts: Mapping[str, Mapping[str, Any]]) -> str:
    """The text with these keys set in these hosts; ConfigError where it lists no such host."""
    edits: list[tuple[int, int, str]] = []
    nodes = _host_nodes(text)
    for name, keys in hosts.items():
        if name not in nodes:
            raise ConfigError(f"the cluster file lists no host {name}")
        edits += _edits(text, nodes[name], keys)
    # From the end, so that earlier places stay where they are.
    for start, stop, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[stop:]
    return text


def host_names(text: str) -> list[str]:
    """The hosts that a cluster file lists."""
    return list(_host_nodes(text))


def _host_nodes(text: str) -> dict[str, yaml.MappingNode]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the cluster file cannot be read: {error}") from error
    hosts = _value(root, "hosts")
    found = {}
    for node in hosts.value if isinstance(hosts, yaml.SequenceNode) else ():
        name = _value(node, "name")
        if isinstance(node, yaml.MappingNode) and isinstance(name, yaml.ScalarNode):
            found[str(name.value)] = node
    return found


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value for name, value in pairs if name.value == key), None)


def _edits(
    text: str, node: yaml.MappingNode, keys: Mapping[str, Any]
) -> list[tuple[int, int, str]]:
    edits, fresh = [], []
    for key, value in keys.items():
        old = _value(node, key)
        if old is None:
            fresh.append(f"{key}: {written(value)}")
        else:
            edits.append((old.start_mark.index, _end(text, old), written(value)))
    if fresh:
        last_key, last = node.value[-1]
        end = _end(text, last)
        between = ", " if node.flow_style else "\n" + " " * last_key.start_mark.column
        if not node.flow_style:  # behind the comment of that line
            line_end = text.find("\n", end)
            end = len(text) if line_end < 0 else line_end
        edits.append((end, end, "".join(between + one for one in fresh)))
    return edits


def _end(text: str, node: yaml.Node) -> int:
    """Where a value ends; that of a block reaches to the next token, over blanks and comments."""
    start, end = node.start_mark.index, node.end_mark.index
    lines = text[start:end].split("\n")
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return start + len("\n".join(lines).rstrip())


def written(value: Any) -> str:
    """A value as YAML, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) or _NUMBER.fullmatch(value)
        return value if is_plain else json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
