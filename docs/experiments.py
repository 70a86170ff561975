"""Writes what the sweeps of conf/experiment/ gave into docs/experiments.md: `make experiments`.

    outputs/sweeps/ID/comparison.csv -> the lines from <!-- result of NAME --> to <!-- end -->

The newest sweep of `experiment=NAME` alone counts. Beside each figure stands what theory expects,
from the configuration of the jobs alone.
"""

from __future__ import annotations

import csv
import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smolrun.benchmarks.stragglers import simulated_s
from smolrun.parts.placement import shares
from smolrun.sanitize import echo

PAGE = Path(__file__).resolve().parent / "experiments.md"
SWEEPS = Path("outputs") / "sweeps"
_PAYLOAD = 1448 / 1514  # of the bytes on a cable; the rest are headers of TCP, IP and Ethernet
_SIMULATED_STEPS = 20_000


@dataclass(frozen=True)
class Cell:
    """A row of a comparison: what differs, the means of its repeats, the configuration and the
    summary of the first."""

    keys: dict[str, str]
    figures: dict[str, float]
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def step_s(self) -> float:
        """Seconds a step."""
        tokens = (
            self.config["training"]["global_batch_size"] * self.config["data"]["sequence_length"]
        )
        return float(tokens / self.figures["tokens_per_s"])

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step, on average."""
        return self.figures["bytes_sent"] / self.summary["steps"] / self.summary["world_size"]

    @property
    def computes(self) -> list[float]:
        """The emulated speed of every host."""
        return [host["emulate"]["compute"] for host in self.config["cluster"]["hosts"]]


def read(sweep: Path) -> list[Cell]:
    """The finished jobs of a sweep, in the order of sweep.yaml."""
    order = [job["name"] for job in yaml.safe_load((sweep / "sweep.yaml").read_text())["jobs"]]
    with (sweep / "comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    rows.sort(key=lambda row: order.index(row["job"]))
    names = list(rows[0]) if rows else []
    first_figure = names.index("final_train_loss") if rows else 0
    keys = [name for name in names[2:first_figure] if name not in ("repeat", "seed", "emulated")]
    cells: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [_cell(sweep, keys, repeats, names[first_figure:]) for repeats in cells.values()]


def _cell(
    sweep: Path, keys: Sequence[str], rows: Sequence[dict[str, str]], figures: Sequence[str]
) -> Cell:
    folder = sweep / rows[0]["job"]
    known = [name for name in figures if all(row[name] for row in rows)]
    return Cell(
        {key: rows[0][key] for key in keys},
        {name: statistics.fmean(float(row[name]) for row in rows) for name in known},
        yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        json.loads((folder / "summary.json").read_text(encoding="utf-8")),
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _loss(cell: Cell) -> str:
    return f"{cell.figures['final_eval_loss']:.3f}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


# --- one function for each experiment: theory beside measurement ----------------------------------


def staleness_stragglers(cells: Sequence[Cell]) -> list[str]:
    """Theory: an event simulation of ranks that are slow by the same chance."""
    emulate = cells[0].config["cluster"]["hosts"][0]["emulate"]
    draw = random.Random(0).random  # noqa: S311  (a simulation, no secret)
    trace = [
        [
            emulate["straggler_factor"] if draw() < emulate["straggler_chance"] else 1.0
            for _ in cells[0].computes
        ]
        for _ in range(_SIMULATED_STEPS)
    ]
    expected = [simulated_s(trace, int(cell.keys["staleness.bound"])) for cell in cells]
    rows = [
        [
            cell.keys["staleness.bound"],
            f"{cell.step_s:.3f}",
            f"{expected[0] / seconds:.2f}",
            f"{cells[0].step_s / cell.step_s:.2f}",
            _loss(cell),
        ]
        for cell, seconds in zip(cells, expected, strict=True)
    ]
    return table(
        ["staleness", "seconds a step", "speed, theory", "speed, measured", "evaluation loss"], rows
    )


def quantization_links(cells: Sequence[Cell]) -> list[str]:
    """Theory: a ring all_reduce sends 2 (p - 1) / p of the gradient; int8 has a byte a number, and
    4 more for each block."""
    rows = []
    for cell in cells:
        ranks, quantization = cell.summary["world_size"], cell.config["quantization"]
        of_a_number = 1 + 4 / quantization["block"] if quantization["kind"] == "int8" else 4.0
        expected = 2 * (ranks - 1) / ranks * of_a_number * cell.summary["parameters"]
        mbps = cell.config["cluster"]["hosts"][0]["emulate"]["bandwidth_mbps"]
        rows.append(
            [
                f"{mbps:g} Mbit/s",
                quantization["kind"],
                _megabytes(expected),
                _megabytes(cell.sent),
                f"{expected * 8 / (mbps * 1e6 * _PAYLOAD):.3f}",
                f"{cell.step_s:.3f}",
                _loss(cell),
            ]
        )
    columns = ["link", "gradients", "sent a rank and step, theory", "measured"]
    columns += ["seconds on the link, theory", "seconds a step", "evaluation loss"]
    return table(columns, rows)


def zero_memory(cells: Sequence[Cell]) -> list[str]:
    """Theory: 4 bytes a parameter for itself, 4 for its gradient, 8 for AdamW's moments, and what
    is sharded is divided by p; stage 3 gathers parameters twice and sends gradients once."""
    rows = []
    for cell in cells:
        stage, ranks = int(cell.keys["algorithm.stage"]), cell.summary["world_size"]
        parameters = cell.summary["parameters"]
        sizes = ((8, stage >= 1), (4, stage >= 2), (4, stage >= 3))
        of_one = [sum(size / (ranks if cut else 1) for size, cut in sizes)]
        sent = (3 if stage == 3 else 2) * (ranks - 1) / ranks * 4 * parameters
        saved = cells[0].figures["peak_memory_bytes"] - cell.figures["peak_memory_bytes"]
        rows.append(
            [
                str(stage),
                f"{of_one[0]:g}",
                f"{(16 - of_one[0]) * parameters / 1e6:.0f} MB",
                f"{saved / 1e6:.0f} MB",
                f"{cell.figures['peak_memory_bytes'] / 1e6:.0f} MB",
                _megabytes(sent),
                _megabytes(cell.sent),
            ]
        )
    columns = ["stage", "bytes a parameter", "less than stage 0, theory", "measured"]
    columns += ["peak of a rank", "sent a rank and step, theory", "measured"]
    return table(columns, rows)


def pipeline_bubble(cells: Sequence[Cell]) -> list[str]:
    """Theory: of m + p - 1 slots of time each stage works in m."""

    def bubble(cell: Cell) -> float:
        stages, parts = cell.summary["world_size"], int(cell.keys["algorithm.micro_batches"])
        return float((stages - 1) / (parts + stages - 1))

    rows = [
        [
            cell.keys["algorithm.micro_batches"],
            f"{bubble(cell):.0%}",
            f"{cell.summary['time']['pipeline_bubble']:.0%}",
            f"{(1 - bubble(cell)) / (1 - bubble(cells[0])):.2f}",
            f"{cells[0].step_s / cell.step_s:.2f}",
            f"{cell.step_s:.3f}",
        ]
        for cell in cells
    ]
    columns = ["micro-batches", "bubble, theory", "measured"]
    return table([*columns, "speed, theory", "measured", "seconds a step"], rows)


def unequal_speeds(cells: Sequence[Cell]) -> list[str]:
    """Theory: a synchronous step lasts as long as its slowest rank; with edp all ranks but the
    server compute all the time."""

    def rate(cell: Cell) -> float:
        """Samples per unit of time, where the sum of all speeds makes one."""
        speeds, size = cell.computes, cell.config["training"]["global_batch_size"]
        if cell.keys["algorithm"] == "edp":
            return sum(speeds[1:]) / sum(speeds)
        weights = [host["speed"] for host in cell.config["cluster"]["hosts"]]
        counts = shares(size, weights)
        slowest = max(count / speed for count, speed in zip(counts, speeds, strict=True))
        return float(size / slowest / sum(speeds))

    rows = []
    for cell in cells:
        is_equal = len({host["speed"] for host in cell.config["cluster"]["hosts"]}) == 1
        rows.append(
            [
                "equal" if is_equal else "by speed",
                cell.keys["algorithm"],
                f"{rate(cell):.0%}",
                f"{rate(cell) / rate(cells[0]):.2f}",
                f"{cells[0].step_s / cell.step_s:.2f}",
                f"{cell.figures['tokens_per_s']:,.0f}",
                _loss(cell),
            ]
        )
    columns = ["shares", "algorithm", "of the sum of speeds, theory", "speed, theory", "measured"]
    return table([*columns, "tokens/s", "evaluation loss"], rows)


EXPERIMENTS: dict[str, Callable[[Sequence[Cell]], list[str]]] = {
    made.__name__: made
    for made in (
        staleness_stragglers,
        quantization_links,
        zero_memory,
        pipeline_bubble,
        unequal_speeds,
    )
}


# --- the page -------------------------------------------------------------------------------------


def result(name: str, sweep: Path) -> list[str]:
    """The lines of an experiment; ValueError for a sweep that is not whole."""
    record = yaml.safe_load((sweep / "sweep.yaml").read_text(encoding="utf-8"))
    cells = read(sweep)
    if len(cells) < len({job["cell"] for job in record["jobs"]}):
        raise ValueError(f"{sweep}: not all jobs are done")
    seconds = sum(cell.figures["wall_s"] for cell in cells)
    versions = cells[0].summary["versions"]
    made = f"{record['started'][:10]}, smolrun {record['version']}, torch {versions['torch']}"
    return [
        *EXPERIMENTS[name](cells),
        "",
        f"`smolrun {' '.join(['-m', *record['overrides']])}`, {made}; {seconds / 60:.1f} minutes.",
    ]


def newest(name: str, folder: Path) -> Path | None:
    """The newest sweep of an experiment as it is, repeats aside, that has a comparison."""
    found = []
    for file in sorted(folder.glob("[0-9]*/sweep.yaml")):  # not the pointer `latest`
        typed = yaml.safe_load(file.read_text(encoding="utf-8"))["overrides"]
        own = [word for word in typed if not word.startswith("sweep.")]
        if own == [f"experiment={name}"] and (file.parent / "comparison.csv").exists():
            found.append(file.parent)
    return found[-1] if found else None


def renewed(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with these lines between the marks of an experiment."""
    begin, end = f"<!-- result of {name} -->\n", "<!-- end -->"
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    text, count = pattern.subn(lambda found: found[1] + "\n".join(lines) + f"\n{found[2]}", page)
    if count != 1:
        raise ValueError(f"the page needs one {begin.strip()} with {end} below it")
    return text


def main(folder: Path = SWEEPS, page: Path = PAGE) -> None:
    """Renew the tables of all experiments that have a sweep in the folder."""
    text = page.read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        sweep = newest(name, folder)
        if sweep is None:
            echo(f"{name}: no sweep in {folder}; run smolrun -m experiment={name}")
            continue
        try:
            text = renewed(text, name, result(name, sweep))
            echo(f"{name}: from {sweep}")
        except ValueError as error:
            echo(f"{name}: left as it was: {error}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
