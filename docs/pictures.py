"""Makes the diagrams and tables of the docs from the code: `make docs`; a test checks that they are
up to date.

docs/layers.md      which layer imports which, from the imports
docs/schedules.md   the hops of every collective, from the schedules that run
docs/algorithms/    the tables between the marks of these pages
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from smolrun.collectives.schedule import (
    Hop,
    Schedule,
    direct_all_gather,
    direct_all_to_all,
    dissemination_barrier,
    elements_sent,
    even_ranges,
    ring_all_reduce,
    ring_reduce_scatter,
    tree_broadcast,
)
from smolrun.parts.pipeline_schedule import SCHEDULES, simulate

ROOT = Path(__file__).resolve().parents[1]
LEAF_PACKAGES = ["models", "data", "checkpoints", "config"]
# Imported from everywhere, so their arrows would say nothing.
LEAF_MODULES = {"errors", "events", "files", "log_records", "sanitize"}


def imports(root: Path) -> set[tuple[str, str]]:
    """(part, another part of smolrun that modules of it import)."""
    found: set[tuple[str, str]] = set()
    files = [*(root / "smolrun").rglob("*.py"), *(root / "tasks").rglob("*.py")]
    for file in sorted(files):
        path = file.relative_to(root).with_suffix("").parts
        part = "tasks" if path[0] == "tasks" else path[1]
        found |= {
            (part, name) for name in _imported_parts(file) if name not in (part, *LEAF_MODULES)
        }
    return found


def _imported_parts(file: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smolrun."):
            yield (node.module or "").split(".")[1]


def layers(root: Path) -> list[list[str]]:
    """The layers of pyproject.toml that exist, from the highest down."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one["id"] == "layers")
    named = [re.findall(r"\w+", layer) for layer in contract["layers"]]
    there = {path.parent.name for path in root.glob("smolrun/*/__init__.py")}
    there |= {path.stem for path in root.glob("smolrun/*.py")} | {"tasks"}
    return [here for layer in named if (here := [name for name in layer if name in there])]


def layers_page(root: Path) -> str:
    """The page about layers, as Markdown with a Mermaid graph."""
    lines = ["flowchart TD"]
    for number, layer in enumerate(layers(root)):
        lines.append(f"  subgraph l{number}[ ]")
        lines.append("    direction LR")
        lines += [f"    {name}" for name in layer]
        lines.append("  end")
    lines += [f"  {name}([{name}])" for name in LEAF_PACKAGES]
    known = {name for layer in layers(root) for name in layer} | set(LEAF_PACKAGES)
    for part, other in sorted(imports(root)):
        if {part, other} <= known:
            lines.append(f"  {part} --> {other}")
    return "\n".join(
        [
            "# Layers",
            "",
            "Arrows are imports; they go from higher to lower layers. The layers are those of",
            "pyproject.toml. Rounded boxes are leaf packages: models, data, checkpoints and",
            "configuration import no layer. `errors`, `events`, `files`, `log_records` and",
            "`sanitize` may be imported from everywhere. import-linter checks all of this in",
            "`make check`. This page is made from the imports by `make docs`.",
            "",
            "```mermaid",
            *lines,
            "```",
            "",
        ]
    )


def table(schedules: list[Schedule]) -> list[str]:
    """What every rank does in every hop, as a Markdown table."""
    most = max(len(schedule) for schedule in schedules)
    rows = ["| rank | " + " | ".join(f"hop {hop}" for hop in range(most)) + " |"]
    rows.append("|---" * (most + 1) + "|")
    for rank, schedule in enumerate(schedules):
        cells = []
        for hop in schedule:
            words = []
            if hop.to is not None:
                words.append(f"{hop.send} → rank {hop.to}")
            if hop.source is not None:
                words.append(f"{hop.receive} ← rank {hop.source}{', add' if hop.adds else ''}")
            cells.append("<br>".join(words))
        cells += [""] * (most - len(cells))
        rows.append(f"| {rank} | " + " | ".join(cells) + " |")
    return rows


def schedules() -> str:
    """The page about schedules."""
    size, elements = 4, 1_000_000
    ring = [ring_all_reduce(rank, size) for rank in range(size)]
    sent = elements_sent(ring[0], even_ranges(elements, size)) / elements
    pages = [
        "# Schedules of the collectives",
        "",
        "Each table is made from the schedule that runs. `2 → rank 1` sends chunk 2 to rank 1;",
        "`3 ← rank 0, add` receives chunk 3 from rank 0 and adds it. Made by `make docs`.",
        "",
        "## Ring all_reduce (large tensors)",
        "",
        *table(ring),
        "",
        f"Every rank sends {sent:g} times the tensor: 2(N-1)/N.",
        "",
        "## Direct all_gather (small tensors; a small all_reduce sums what it gathered)",
        "",
        *table([direct_all_gather(rank, size) for rank in range(size)]),
        "",
        "## Broadcast from rank 0 in a binomial tree (8 ranks)",
        "",
        *table([tree_broadcast(rank, 8, 0) for rank in range(8)]),
        "",
        "## Dissemination barrier",
        "",
        *table([dissemination_barrier(rank, size) for rank in range(size)]),
        "",
    ]
    return "\n".join(pages)


def syncps_schedule(rank: int, size: int) -> Schedule:
    """What a rank sends and receives in a step of syncps, in the order in which the server sums and
    replies. Chunk r is the gradient of rank r, 0 the weights."""
    workers = range(1, size)
    if rank == 0:
        pushes = [Hop(source=worker, receive=worker, adds=True) for worker in workers]
        return pushes + [Hop(to=worker, needs=len(pushes)) for worker in workers]
    hops = [Hop()] * (2 * len(workers))
    hops[rank - 1] = Hop(to=0, send=rank)
    hops[rank - 1 + len(workers)] = Hop(source=0)
    return hops


def pipeline(name: str, stages: int, micro_batches: int, replicas: int = 1) -> list[str]:
    """What every stage does when, if a forward takes as long as a backward and hops no time; with
    several replicas, when a stage sums with that of the others."""
    actions = [SCHEDULES[name](stage, stages, micro_batches) for stage in range(stages)]
    step = simulate(actions, [1.0] * stages, [1.0] * stages)
    slots = int(step.seconds) + (replicas > 1)
    rows = [f"| {name} | " + " | ".join(str(slot) for slot in range(slots)) + " |"]
    rows.append("|---" * (slots + 1) + "|")
    for rank in range(stages * replicas):
        timed = step.stages[rank % stages]
        cells = ["."] * slots
        for (kind, number), begin_s in ((one.action, one.begin_s) for one in timed):
            cells[int(begin_s)] = f"{kind[0].upper()}{number}"
        if replicas > 1:
            begun = int(timed[-1].end_s)
            cells[begun:] = ["sum"] * (slots - begun)
        rows.append(f"| rank {rank} | " + " | ".join(cells) + " |")
    return rows


BEGIN, END = "<!-- drawn by `make docs` -->\n", "<!-- end -->\n"
DRAWN = {
    "classicdp": table([ring_all_reduce(rank, 3) for rank in range(3)]),
    "fsdp": table([ring_reduce_scatter(rank, 3) for rank in range(3)]),
    "syncps": table([syncps_schedule(rank, 3) for rank in range(3)]),
    "ep": table([direct_all_to_all(rank, 3) for rank in range(3)]),
    "mp": pipeline("1f1b", 3, 1),
    "mp_pipeline": [
        *(*pipeline("1f1b", 3, 4), "", *pipeline("gpipe", 3, 4), ""),
        "Two pipelines of two stages, `algorithm.replicas=2`; sum is an all_reduce of gradients,",
        *("between ranks 0 and 2, and between ranks 1 and 3:", ""),
        *pipeline("1f1b", 2, 4, replicas=2),
    ],
}


def redrawn(page: str, lines: list[str]) -> str:
    """The page with these lines between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "".join([before, BEGIN, *(f"{line}\n" for line in lines), END, after])


def main(folder: Path) -> None:
    """Writes the pages into a folder."""
    (folder / "algorithms").mkdir(exist_ok=True)
    for name, drawn in DRAWN.items():
        page = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text(encoding="utf-8")
        text = redrawn(page, drawn)
        (folder / "algorithms" / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / "layers.md").write_text(layers_page(ROOT), encoding="utf-8")
    (folder / "schedules.md").write_text(schedules(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
