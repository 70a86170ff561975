"""Problem lines: `key = value: what is wrong; allowed: ...; did you mean X?`"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from smolrun.config.synonyms import SYNONYMS
from smolrun.sanitize import one_line, without_credentials

LONGEST_VALUE = 60


def problem(key: str, value: Any, what: str, *, allowed: str = "", meant: str | None = None) -> str:
    """One line about one key that has a value."""
    return _line(f"{key} = {shown(value)}", what, allowed, meant)


def absent(
    key: str, what: str = "must be given", *, allowed: str = "", meant: str | None = None
) -> str:
    """One line about a key without a value."""
    return _line(key, what, allowed, meant)


def shown(value: Any) -> str:
    """A value as the user would write it, cut short."""
    text = value if isinstance(value, str) and value else json.dumps(value, default=str)
    text = one_line(without_credentials(text))
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that means the same elsewhere, or looks most like this one, or None.

    For dotted keys the last part may match alone.
    """
    names = list(dict.fromkeys(known))
    if same := [name for name in SYNONYMS.get(word.lower(), ()) if name in names]:
        return " or ".join(same)
    end = f".{word.rpartition('.')[2].lower()}"
    same_end = [word] if word in names else [n for n in names if n.lower().endswith(end)]
    if "." in word and 1 <= len(same_end) <= 2:  # the right key in the wrong group
        return " or ".join(same_end)
    lower = {name.lower(): name for name in reversed(names)}
    if found := difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.75):
        return lower[found[0]]
    last = word.rpartition(".")[2].lower()
    ends: dict[str, str] = {}
    # A key of the whole run is meant more often than one of an entry of a list.
    for name in sorted(names, key=lambda name: "[" in name):
        ends.setdefault(name.rpartition(".")[2].lower(), name)
    found = difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
    return ends[found[0]] if found else None


def _line(subject: str, what: str, allowed: str, meant: str | None) -> str:
    parts = [f"{subject}: {what}"]
    if allowed:
        parts.append(f"allowed: {allowed}")
    if meant:
        parts.append(f"did you mean {meant}?")
    return "; ".join(parts)
