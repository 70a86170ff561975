"""docs/configuration.md from the classes and files: `python -m smolrun.cli.reference FILE`.

It writes outputs.md and combinations.md beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from smolrun.cli import choices, combinations, compose, outputs
from smolrun.cli.arguments import Arguments
from smolrun.config import RunConfig
from smolrun.config.base import CustomTarget
from smolrun.config.describe import NOT_BUILT, choices_of, keys_of, sections_of

HEAD = """\
# Configuration

<!-- Made by `make docs` from smolrun/config/ and conf/. Change those, not this file. -->

A run is configured by choices and values. A choice picks a file of a group: `model=gpt_small` is
`conf/model/gpt_small.yaml`. A value sets one key: `training.steps=50`. `smolrun --cfg job` shows
what they give together, as composed, unchecked, and runs nothing.

- A folder `conf/` where you stand comes first: `conf/cluster/home.yaml` is `cluster=home`, and a
  file with the name of a shipped one replaces it.
- Your own code: `model.target=my_code.model:build` (also `data.target`, `algorithm.target`). Every
  key beside `name` and `target` becomes a keyword argument of it.
- Several runs: `smolrun -m algorithm=single,classicdp seed=1,2` runs all four combinations.
- What Hydra's grammar cannot read is text where nothing else can be meant: `data.path=größe.txt`.
  Values with commas, parentheses or quotes need quotes, inside those of the shell:
  `'data.path="a(b).txt"'`. `1e3` is an integer where one is asked for.
- Two words of other programs work too: `algorithm=ddp` is `classicdp`,
  `training.gradient_checkpointing` is `training.recompute`.
- A key without a default must be given.
- A wrong name, key or value is told with all others in one message; then nothing is started.

## Keys of the whole run
"""


def text() -> str:
    """The whole page."""
    shipped = [choices.shipped_folder()]
    groups = choices.groups(shipped)
    with compose.composing(Arguments()):
        base = compose.plain(compose.composed(Arguments()))
        lines = [HEAD, *_top_keys(base)]
        for group, default in choices.defaults(shipped).items():
            names = sorted(groups[group], key=lambda name: (name != default, name))
            lines += ["", f"## {group}", "", *_choices(group, groups[group], default)]
            if group == "cluster":
                lines += _cluster()
            elif group in RunConfig.model_fields and group not in _plain_keys():
                lines += _keys(group, {name: _composed(group, name) for name in names})
    return "\n".join(lines) + "\n"


def _plain_keys() -> list[str]:
    """Top-level keys that are one value."""
    fields = RunConfig.model_fields.items()
    return [name for name, field in fields if not sections_of(field)]


def _composed(group: str, choice: str) -> Any:
    return compose.plain(compose.composed(Arguments([f"{group}={choice}"])))[group]


def _top_keys(base: Mapping[str, Any]) -> Iterator[str]:
    rows = [key for key in keys_of(RunConfig) if key.path in _plain_keys()]
    yield from _table(("key", "default", "allowed", "meaning"))
    for key in rows:
        yield _row(f"`{key.path}`", _shown(base[key.path]), key.allowed, key.meaning)


def _choices(group: str, names: Mapping[str, str], default: str) -> Iterator[str]:
    yield from _table(("choice", "what it is"))
    for name in sorted(names, key=lambda name: (name != default, name)):
        mark = " (default)" if name == default else ""
        yield _row(f"`{group}={name}`{mark}", names[name])
    later = NOT_BUILT.get(group)
    if later:
        yield from ("", f"Planned, not built yet: {', '.join(later)}.")


def _cluster() -> Iterator[str]:
    """A file of your own needs few keys here, so the classes have defaults; these are shown."""
    yield ""
    yield from _table(("key", "default", "allowed", "meaning"))
    for key in keys_of(RunConfig):
        if key.path.startswith("cluster."):
            default = "" if key.required else _shown(_plain(key.default))
            yield _row(f"`{key.path}`", default, key.allowed, key.meaning)


def _keys(group: str, values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One table per class of the group, with one column per choice that is of this class."""
    for section in sections_of(RunConfig.model_fields[group]):
        names = [name for name, value in values.items() if _is_of(section, value)]
        keys = [key for key in keys_of(section) if key.path not in ("name", "target")]
        if not names or not keys:
            continue
        yield from ("", _first_line(section), "")
        yield from _table(("key", *names, "allowed", "meaning"))
        for key in keys:
            cells = [
                _shown(values[name][key.path]) if key.path in values[name] else "" for name in names
            ]
            path = f"{group}.{key.path}"
            yield _row(f"`{path}`", *cells, key.allowed, key.meaning)


def _is_of(section: type[BaseModel], value: Mapping[str, Any]) -> bool:
    if issubclass(section, CustomTarget):
        return False
    tags = [tag for tag in ("target", "name", "kind") if tag in section.model_fields]
    tag = next((tag for tag in tags if choices_of(section.model_fields[tag])), None)
    return tag is None or value.get(tag) in choices_of(section.model_fields[tag])


def _first_line(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _table(columns: tuple[str, ...]) -> Iterator[str]:
    yield _row(*columns)
    yield "|" + " --- |" * len(columns)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def _shown(value: Any) -> str:
    is_word = isinstance(value, str) and value.strip() == value != ""
    return f"`{value if is_word else json.dumps(value)}`"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(text(), encoding="utf-8")
    page.with_name("outputs.md").write_text(outputs.text(), encoding="utf-8")
    page.with_name("combinations.md").write_text(combinations.text(), encoding="utf-8")
