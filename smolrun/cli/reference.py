"""docs/configuration.md from the classes and files: `python -m smolrun.cli.reference FILE`.

It writes outputs.md and combinations.md beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from smolrun.cli import choices, compose, outputs
from smolrun.cli.arguments import Arguments
from smolrun.config import RunConfig, validate
from smolrun.config.base import CustomTargetConfig
from smolrun.config.describe import NOT_BUILT, choices_of, keys_of, sections_of
from smolrun.errors import ConfigError

HEAD = """\
# Configuration

<!-- Made by `make docs` from smolrun/config/ and conf/. Change those, not this file. -->

A run is configured by choices and values. A choice picks a file of a group: `model=gpt_small` is
`conf/model/gpt_small.yaml`. A value sets one key: `training.steps=50`. `smolrun --cfg job` shows
what they give together, as composed, unchecked, and runs nothing.

- A folder `conf/` in the current folder has priority: `conf/cluster/home.yaml` is `cluster=home`,
  and a file with the name of a shipped one replaces it.
- Your own code: `model.target=my_code.model:build` (also `data.target`, `algorithm.target`). Every
  key beside `name` and `target` becomes a keyword argument of it.
- Several runs: `smolrun -m algorithm=single,classicdp seed=1,2` runs all four combinations.
- What Hydra's grammar cannot parse is text where that is unambiguous: `data.path=größe.txt`.
  Values with commas, parentheses or quotes need quotes, inside those of the shell:
  `'data.path="a(b).txt"'`. `1e3` is an integer where one is asked for.
- Aliases: `algorithm=ddp` is `classicdp`, `training.gradient_checkpointing` is
  `training.recompute`; a task has short names of its keys: `task=stop run=NAME` is
  `task=stop stop.run=NAME`.
- A key without a default must be given.
- All errors of names, keys and values are reported in one message, and nothing is started.

## Keys of the whole run
"""


COMBINATIONS = """\
# What goes together

<!-- Made by `make docs` from the checks in smolrun/config/ and from conf/. Change those, not this file. -->

`staleness.bound` and `quantization` for every algorithm. A combination that does not work is an error
before anything starts, for the reason below. `int8`, `fp16` and `bf16` are alike in this.
"""  # noqa: E501  (a comment of the page)

STALENESS = {"synchronous": "staleness.bound=0", "staleness K": "staleness.bound=2"}
QUANTIZATION = {"unquantized": "quantization=none", "quantized": "quantization=int8"}
COLUMNS = {
    (when, how): [staleness, quantization]
    for (when, staleness), (how, quantization) in product(STALENESS.items(), QUANTIZATION.items())
}


def text() -> str:
    """The whole page."""
    shipped = [choices.shipped_folder()]
    groups = choices.groups(shipped)
    with compose.composing(Arguments()):
        base = compose.plain(compose.composed(Arguments()))
        lines = [HEAD, *_top_keys(base, groups)]
        for group, default in choices.defaults(shipped).items():
            names = sorted(groups[group], key=lambda name: (name != default, name))
            lines += ["", f"## {group}", "", *_choices(group, groups[group], default)]
            if group == "cluster":
                lines += _cluster()
            elif _is_section(group):
                lines += _keys(group, {name: _composed(group, name) for name in names})
    return "\n".join(lines) + "\n"


def _is_section(group: str) -> bool:
    field = RunConfig.model_fields.get(group)
    return field is not None and bool(sections_of(field))


def _composed(group: str, choice: str) -> Any:
    return compose.plain(compose.composed(Arguments([f"{group}={choice}"])))[group]


def _top_keys(base: Mapping[str, Any], groups: Collection[str]) -> Iterator[str]:
    """Keys without a folder of choices: of the run, and of single tasks."""
    yield from _table(("key", "default", "allowed", "meaning"))
    for key in keys_of(RunConfig):
        group, _, name = key.path.partition(".")
        if not name or group not in groups:
            value = base[group][name] if name else base[group]
            yield _row(f"`{key.path}`", _shown(value), key.allowed, key.meaning)


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
    if issubclass(section, CustomTargetConfig):
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


def combination_rows() -> list[list[str]]:
    """The choices of each row: every algorithm, with every stage where it has some."""
    found = []
    with compose.composing(Arguments()):
        for name in sorted(choices.groups([choices.shipped_folder()])["algorithm"]):
            chosen = f"algorithm={name}"
            has_stages = "stage" in compose.values(Arguments([chosen]))["algorithm"]
            stages = [f"algorithm.stage={stage}" for stage in range(4)] if has_stages else []
            found += [[chosen, stage] for stage in stages] or [[chosen]]
    return found


def _refusals() -> dict[tuple[str, tuple[str, str]], str]:
    """Why each combination is refused, by row and column; empty where it works."""
    found = {}
    all_rows = combination_rows()
    with compose.composing(Arguments()):
        for row, (column, keys) in product(all_rows, COLUMNS.items()):
            single = ["cluster.ranks=1"] if row == ["algorithm=single"] else []
            data = compose.values(Arguments([*row, *keys, *single]))
            try:
                validate(data)
                found[" ".join(row), column] = ""
            except ConfigError as error:
                found[" ".join(row), column] = str(error)
    return found


def combinations() -> str:
    """docs/combinations.md: algorithm by staleness and quantization; why a combination is refused.

    Each cell is a configuration that was composed and checked.
    """
    return "\n".join([COMBINATIONS, *_refusal_table(_refusals())]) + "\n"


def _refusal_table(found: dict[tuple[str, tuple[str, str]], str]) -> Iterator[str]:
    reasons = list(dict.fromkeys(why for why in found.values() if why))
    yield "| algorithm | " + " | ".join(f"{when}, {how}" for when, how in COLUMNS) + " |"
    yield "|" + " --- |" * (len(COLUMNS) + 1)
    for row in dict.fromkeys(row for row, _ in found):
        cells = [found[row, column] for column in COLUMNS]
        shown = [f"refused ({reasons.index(why) + 1})" if why else "works" for why in cells]
        yield f"| `{row}` | " + " | ".join(shown) + " |"
    yield ""
    for number, why in enumerate(reasons, start=1):
        yield f"{number}. {why}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(text(), encoding="utf-8")
    page.with_name("outputs.md").write_text(outputs.text(), encoding="utf-8")
    page.with_name("combinations.md").write_text(combinations(), encoding="utf-8")
