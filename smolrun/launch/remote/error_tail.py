"""What another machine said, made fit for one of our sentences. Pure."""

from __future__ import annotations

from smolrun.sanitize import one_line

_MOST_CHARS = 300


def last_words(*outputs: bytes) -> str:
    """The last line of the first output that has one."""
    for output in outputs:
        if lines := output.decode("utf-8", "replace").strip().splitlines():
            return one_line(lines[-1]).strip()[:_MOST_CHARS]
    return "it said nothing"
