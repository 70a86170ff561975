"""pydantic's errors as lines a person can act on, one per key.

Knows nothing of Hydra or the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from smolrun.config.describe import (
    NOT_BUILT,
    absent_hint,
    allowed_values,
    choices_of,
    keys_of,
    sections_of,
)
from smolrun.config.run import RunConfig
from smolrun.config.suggest import absent, closest, problem, shown
from smolrun.config.synonyms import RENAMED_KEYS, SYNONYMS

WHAT = {
    "int_type": "not an integer",
    "int_from_float": "not an integer",
    "float_type": "not a number",
    "finite_number": "not a finite number",
    "bool_type": "neither true nor false",
    "string_type": "not text (to make it text, write it in quotes)",
    "literal_error": "no such choice",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "less_than": "too large",
    "less_than_equal": "too large",
    "list_type": "not a list",
    "too_short": "too few entries",
    "too_long": "too many entries",
    "string_too_short": "empty",
    "string_pattern_mismatch": "not of the right form",
    "model_type": "not a group of keys",
    "model_attributes_type": "not a group of keys",
    "union_tag_not_found": "must be given",
    "union_tag_invalid": "no such choice",
}
# When a key allows several types, pydantic reports one error per type. The one that is about the
# value says most.
RANK = (
    "value_error",
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "string_pattern_mismatch",
)
_NO_SECTION = ("model_type", "model_attributes_type")

Place = tuple[str | int, ...]


def lines(error: ValidationError, data: Mapping[str, Any]) -> list[str]:
    """One line per key that is wrong, in the order of the configuration."""
    by_place: dict[Place, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_place.setdefault(_place(details, data), []).append(details)
    return [_line(place, errors, data) for place, errors in by_place.items()]


@cache
def known_keys() -> dict[str, FieldInfo]:
    """Every key of RunConfig by its dotted path; the first class wins where several have one."""
    found: dict[str, FieldInfo] = {}
    for path, field in keys_of(RunConfig):
        found.setdefault(path, field)
    return found


def takes_text(key: str, text: str) -> bool:
    """Whether a key, `data.path`, may have this text as its value."""
    field = known_keys().get(key)
    if field is None:  # of the user's own code, perhaps
        return key.partition(".")[0] in ("model", "data", "algorithm")
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(text, strict=True)
    except ValidationError:
        return False
    return True


def _place(details: ErrorDetails, data: Any) -> Place:
    """Where in the user's data the error is: pydantic's path without the names of union members."""
    place: list[str | int] = []
    value: Any = data
    parts = details["loc"]
    for position, part in enumerate(parts):
        is_last = position == len(parts) - 1
        if isinstance(value, Mapping) and (
            part in value or (is_last and details["type"] == "missing")
        ):
            place.append(part)
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(part, int):
            place.append(part)
            value = value[part]
    return tuple(place)


def _line(place: Place, errors: list[ErrorDetails], data: Mapping[str, Any]) -> str:
    details = min(
        errors, key=lambda error: RANK.index(error["type"]) if error["type"] in RANK else len(RANK)
    )
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(place, details["input"], data)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        place = (*place, str(details["ctx"]["discriminator"]).strip("'"))
    allowed = _allowed(place, data)
    if "expected_tags" in details.get("ctx", {}):
        allowed = details["ctx"]["expected_tags"].replace("'", "").replace(", ", " or ")
    if kind in ("missing", "union_tag_not_found"):
        asked = absent_hint(_field(place, data))
        return absent(path(place), asked) if asked else absent(path(place), allowed=allowed)
    value = _value(place, data)
    if shown(value) in NOT_BUILT.get(path(place), ()):
        return problem(path(place), value, "not built yet", allowed=allowed)
    if kind == "value_error":
        what = str(details["ctx"]["error"])
    elif len(errors) > 1 and kind not in RANK:
        what = "not understood"
    else:
        what = WHAT.get(kind, details["msg"])
    meant = closest(value, allowed.split(" or ")) if isinstance(value, str) else None
    if kind == "list_type" and "hosts" not in place:
        meant = f"'{path(place)}=[{shown(value)}]'"
    line = problem(path(place), value, what, allowed=allowed, meant=meant)
    if not (kind in ("list_type", *_NO_SECTION) and "hosts" in place and isinstance(value, str)):
        return line
    entry = f"{{name: {shown(value)}, ssh: {shown(value)}}}"
    entry = f"'{path(place)}=[{entry}]'" if kind == "list_type" else entry
    return f"{line}; a host is written as {entry}; `smolrun task=init` writes a file of them"


def _unknown_key(place: Place, value: Any, data: Mapping[str, Any]) -> str:
    section, start = _section(place[:-1], data), path(place[:-1])
    name = (RENAMED_KEYS.get(path(place)) or str(place[-1])).rpartition(".")[2]
    while isinstance(value, Mapping) and len(value) == 1:  # say the key as it was typed
        ((part, value),) = value.items()
        place = (*place, part)
    siblings = list(section.model_fields) if section else []
    allowed = ", ".join(siblings)
    if same := f"{start}.{name}" if name in siblings else _synonyms(place, value, data):
        return problem(path(place), value, "no such key", allowed=allowed, meant=same)
    if choices := _choices_with(start, name):
        line = problem(path(place), value, "no such key", allowed=allowed)
        return f"{line}; {name} is a key of {choices}"
    # Keys are compared without the group, which all of them begin with. Its name and target say
    # which choice it is, so they are never proposed.
    tags = () if "." in start else ("name", "target")
    near = closest(name, [key for key in siblings if key not in tags])
    if start and near:
        meant: str | None = f"{start}.{near}"
    else:
        others = [key for key in known_keys() if _is_elsewhere(key, start, data)]
        last = f".{place[-1]}"  # of whatever group
        meant = closest(last, others) if start else closest(path(place), [*siblings, *others])
    return problem(path(place), value, "no such key", allowed=allowed, meant=meant)


def _synonyms(place: Place, value: Any, data: Mapping[str, Any]) -> str:
    """What other programs' word for a key is here, as it would be typed; empty for none."""
    words = SYNONYMS.get(path(place)) or [
        word for word in SYNONYMS.get(str(place[-1]), ()) if " " not in word
    ]
    found = []
    for word in words:
        choice, _, key = word.rpartition(" ")
        group, _, name = key.partition(".")
        section = RunConfig if not name else _section((group,), data) if group in data else None
        if choice:
            found.append(f"{word}={shown(value)}")
        elif section is not None and (name or group) in section.model_fields:
            found.append(word)
    return " or ".join(found)


def _choices_with(group: str, name: str) -> str:
    """The shipped choices of a group that have this key, as `algorithm=edp, syncps`; empty for
    none."""
    folder = files("smolrun.conf") / group
    if not group or not folder.is_dir():
        return ""
    choices = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    has_key = re.compile(rf"^{re.escape(name)}:", re.MULTILINE)
    found = [
        file.name.removesuffix(".yaml")
        for file in choices
        if has_key.search(file.read_text(encoding="utf-8"))
    ]
    return f"{group}={', '.join(sorted(found))}" if found else ""


def _is_elsewhere(key: str, start: str, data: Mapping[str, Any]) -> bool:
    """Whether a key is in another place than `start`, and one of what is chosen there."""
    group, _, rest = key.partition(".")
    place, _, name = key.rpartition(".")
    if place == re.sub(r"\[\d+\]", "[]", start) or name in ("name", "target"):
        return False
    section = _section((group,), data) if isinstance(data.get(group), Mapping) else None
    return not rest or section is None or re.split(r"\W", rest)[0] in section.model_fields


def path(place: Place) -> str:
    """`cluster.hosts[0].ssh`"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def _value(place: Place, data: Any) -> Any:
    for part in place:
        data = data[part]
    return data


def _section(place: Place, data: Mapping[str, Any]) -> type[BaseModel] | None:
    """The class that the mapping at this place is meant to be, or None where anything goes."""
    section: type[BaseModel] = RunConfig
    value: Any = data
    for part in place:
        value = value[part]
        if isinstance(part, str):
            field = section.model_fields.get(part)
            candidates = sections_of(field) if field else []
            if not candidates:
                return None
        section = _chosen(candidates, value)
    return section


def _chosen(candidates: list[type[BaseModel]], value: Any) -> type[BaseModel]:
    """The candidate whose `target`, `name` or `kind` is the value's, else the last (the custom
    one, or the only one).
    """
    for candidate in candidates if isinstance(value, Mapping) else []:
        for tag in ("target", "name", "kind"):
            field = candidate.model_fields.get(tag)
            if field is not None and value.get(tag) in choices_of(field):
                return candidate
    return candidates[-1]


def _allowed(place: Place, data: Mapping[str, Any]) -> str:
    while place and isinstance(place[-1], int):
        place = place[:-1]  # an entry of a list: what the whole list allows says it best
    field = _field(place, data)
    return allowed_values(field) if field is not None else ""


def _field(place: Place, data: Mapping[str, Any]) -> FieldInfo | None:
    section = _section(place[:-1], data) if place else None
    return section.model_fields.get(str(place[-1])) if section else None
