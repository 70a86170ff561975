"""docs/combinations.md: which algorithm goes with which staleness and quantization, and why not.

Every cell is a configuration that was composed and checked, so the page says what a run would.
`python -m smolrun.cli.reference` writes it beside its own page.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from smolrun.cli import choices, compose
from smolrun.cli.arguments import Arguments
from smolrun.config import validate
from smolrun.errors import ConfigError

HEAD = """\
# What goes together

<!-- Made by `make docs` from the checks in smolrun/config/ and from conf/. Change those, not this file. -->

`staleness.bound` and `quantization` for every algorithm. What is refused is refused for the reason
below, before anything starts. `int8`, `fp16` and `bf16` are alike in this.
"""  # noqa: E501  (a comment of the page)

STALENESS = {"on time": "staleness.bound=0", "K steps late": "staleness.bound=2"}
QUANTIZATION = {"as they are": "quantization=none", "in fewer bits": "quantization=int8"}
COLUMNS = {
    (when, how): [staleness, quantization]
    for (when, staleness), (how, quantization) in product(STALENESS.items(), QUANTIZATION.items())
}


def rows() -> list[list[str]]:
    """The choices of each row: every algorithm, with every stage where it has some."""
    found = []
    with compose.composing(Arguments()):
        for name in sorted(choices.groups([choices.shipped_folder()])["algorithm"]):
            chosen = f"algorithm={name}"
            has_stages = "stage" in compose.values(Arguments([chosen]))["algorithm"]
            stages = [f"algorithm.stage={stage}" for stage in range(4)] if has_stages else []
            found += [[chosen, stage] for stage in stages] or [[chosen]]
    return found


def refusals() -> dict[tuple[str, tuple[str, str]], str]:
    """Why each combination is refused, by row and column; empty where it works."""
    found = {}
    all_rows = rows()
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


def text() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_table(refusals())]) + "\n"


def _table(found: dict[tuple[str, tuple[str, str]], str]) -> Iterator[str]:
    reasons = list(dict.fromkeys(why for why in found.values() if why))
    yield "| gradients | " + " | ".join(f"{when}, {how}" for when, how in COLUMNS) + " |"
    yield "|" + " --- |" * (len(COLUMNS) + 1)
    for row in dict.fromkeys(row for row, _ in found):
        cells = [found[row, column] for column in COLUMNS]
        shown = [f"refused ({reasons.index(why) + 1})" if why else "works" for why in cells]
        yield f"| `{row}` | " + " | ".join(shown) + " |"
    yield ""
    for number, why in enumerate(reasons, start=1):
        yield f"{number}. {why}"
