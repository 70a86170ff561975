"""What another machine said, made fit for one of our sentences. Pure."""

from __future__ import annotations

_MOST_CHARS = 300


def printable(text: str) -> str:
    """Without line ends, and without the escapes by which a stranger could paint on a terminal."""
    return "".join(char if char.isprintable() else " " for char in text).strip()


def last_words(*outputs: bytes) -> str:
    """The last line of the first output that has one."""
    for output in outputs:
        if lines := output.decode("utf-8", "replace").strip().splitlines():
            return printable(lines[-1])[:_MOST_CHARS]
    return "it said nothing"
