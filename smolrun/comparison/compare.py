"""Runs in, comparison.html, .md and .csv out: the steps of a comparison, in order."""

from __future__ import annotations

import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from smolrun.comparison import plots, report, wandb_report
from smolrun.comparison.cells import Cell, cautions, make_cells
from smolrun.comparison.report import ComparisonReport, ComparisonTable
from smolrun.comparison.run_figures import read_run
from smolrun.comparison.selection import Selection, of_sweep
from smolrun.comparison.verdict import (
    METRICS,
    TIME_TO_LOSS,
    Metric,
    Target,
    common_target,
    values,
    verdict,
)
from smolrun.errors import SmolrunError
from smolrun.files import atomic_write
from smolrun.sanitize import one_line
from smolrun.tracking.formatting import counted

NAME = "comparison"
# A word of a command that a shell takes as it is, and that names no code to run.
_PLAIN_WORD = re.compile(r"(?!.*(target|path|url|run))[a-z_]+(\.[a-z_]+)*=[\w.,/-]+", re.ASCII)
_LR = "optimizer.lr"

Say = Callable[[str], None]


def compare_sweep(folder: Path, *, say: Say) -> Path | None:
    """Compare the jobs of a sweep, and write the result into its folder; returns the page, None
    where nothing could be compared or written. Never raises for what is in the folder."""
    try:
        selection = of_sweep(folder)
        if not selection.jobs:
            say(f"nothing to compare in {one_line(str(folder))}")
            return None
        return compare_runs(selection, say=say, online=True)
    except (SmolrunError, OSError) as error:
        say(f"no comparison: {one_line(str(error))}")
        return None


def compare_runs(
    selection: Selection,
    *,
    say: Say,
    metric: str | None = None,
    out: Path | None = None,
    online: bool = False,
) -> Path:
    """Write comparison.html, .md and .csv into `out` (default: the selection's own place), and pass
    verdict and table to `say`; returns the page. `online`: make a W&B report too, if the runs are
    in W&B. OSError where it cannot be written."""
    made = make_report(selection, metric)
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for section in made.sections:
        for line in _spoken(section, room):
            say(line)
    page = write(made, out or selection.out)
    if online:
        wandb_report.publish(made, say)
    return page


def make_report(selection: Selection, metric: str | None = None) -> ComparisonReport:
    """Read all runs and compare them."""
    runs = [read_run(job.folder, job.name) for job in selection.jobs]
    notes = list(selection.notes)
    wanted = metric or selection.metric
    sort = next((one for one in METRICS if one.key == wanted), None)
    if wanted is not None and sort is None:
        notes.append(f"the metric {one_line(wanted)[:60]} is none of a comparison")
    kinds = [bool(run.emulated) for run in runs]
    sections = []
    for is_emulated in (False, True):
        chosen = [n for n, kind in enumerate(kinds) if kind == is_emulated]
        if chosen:
            of_kind = [runs[n] for n in chosen]
            jobs = [selection.jobs[n] for n in chosen]
            keys, cells = make_cells(jobs, of_kind)
            heading = "Emulated machines" if is_emulated else "Real machines"
            shown = heading if is_emulated or len(set(kinds)) > 1 else ""
            sections.append(_section(shown, keys, cells, sort, selection))
    if len(sections) > 1:
        notes.append(
            "Some of these runs emulate slower machines, others do not: their times are not"
            " comparable, so they are in tables of their own."
        )
    now = f"{datetime.now().astimezone():%Y-%m-%d %H:%M}"
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    return ComparisonReport(
        selection.title, f"{count}, compared {now} by smolrun {_version()}", sections, notes
    )


def _version() -> str:
    try:
        return version("smolrun")
    except Exception:  # not installed
        return "of unknown version"


def _section(
    heading: str, keys: Sequence[str], cells: Sequence[Cell], sort: Metric | None, of: Selection
) -> ComparisonTable:
    target = common_target(cells)
    metric = sort or (TIME_TO_LOSS if target else METRICS[1])
    ordered = sorted(cells, key=lambda cell: _place(cell, metric, target))
    warnings = list(cautions(ordered))
    if heading.startswith("Emulated"):
        warnings.insert(0, _emulated(cells))
    drawn, note = _plots(ordered, target)
    return ComparisonTable(
        heading,
        keys,
        ordered,
        metric,
        target,
        verdict(ordered, target, tuning_command(cells, of.overrides)),
        _few(warnings),
        drawn,
        note,
    )


def _plots(cells: Sequence[Cell], target: Target | None) -> tuple[list[plots.Plot], str]:
    """The plots, and why there are none or not all."""
    if not plots.can_plot():
        return [], "No plots: matplotlib is not installed (pip install matplotlib)."
    try:
        drawn = plots.draw_all(cells, target)
    except (ValueError, ArithmeticError) as error:
        return [], f"No plots: the figures of these runs cannot be drawn ({type(error).__name__})."
    most = plots.MOST_SERIES
    few = f"Plots show the first {most} of {len(cells)} rows of the table."
    return drawn, few if len(cells) > most else ""


def _emulated(cells: Sequence[Cell], most: int = 2) -> str:
    """What the emulated hosts emulate; a run that has not ended says less about that."""
    runs = [run for cell in cells for run in cell.runs.values()]
    ended = [run for run in runs if run.state == "done"] or runs
    found = list(dict.fromkeys(host for run in ended for host in run.emulated))
    left = len(found) - most
    more = f"; and {left} more" if left > 0 else ""
    hosts = counted(len(found), "emulated machine")
    return f"Times are those of {hosts}: {'; '.join(found[:most])}{more}."


def _few(warnings: Sequence[str], most: int = 12) -> list[str]:
    left = len(warnings) - most
    return [*warnings[:most], *([f"And {left} more of this kind."] if left > 0 else [])]


def _place(cell: Cell, metric: Metric, target: Target | None) -> tuple[bool, float]:
    numbers = list(values(metric, cell, target).values())
    mean = statistics.fmean(numbers) if numbers else 0.0
    return not numbers, -mean if metric.is_more_better else mean


def tuning_command(cells: Sequence[Cell], overrides: Sequence[str]) -> str | None:
    """A sweep over learning rates, where all cells have one and their algorithms differ; else
    None."""
    runs = [run for cell in cells for run in cell.runs.values() if run.config]
    rates = {run.config.get(_LR) for run in runs}
    algorithms = list(dict.fromkeys(run.config.get("algorithm.name", "") for run in runs))
    if len(algorithms) < 2 or len(rates) != 1:
        return None
    try:
        lr = float(str(rates.pop()))
    except ValueError:
        return None
    words = [word for word in overrides if _PLAIN_WORD.fullmatch(word)]
    words = [word for word in words if not word.startswith((_LR, "sweep."))]
    if not any(word.startswith("algorithm=") for word in words):
        names = [name for name in algorithms if re.fullmatch(r"[a-z_]{1,40}", name)]
        words = [f"algorithm={','.join(names)}", *words]
    tried = ",".join(f"{lr * factor:.2g}" for factor in (0.3, 1, 3))
    words += [f"{_LR}={tried}"]
    return f"smolrun -m {' '.join(map(shlex.quote, words))}"


def _spoken(section: ComparisonTable, room: int | None) -> list[str]:
    lines = [section.heading] if section.heading else []
    lines += [report.plain(sentence) for sentence in section.sentences]
    lines += [f"- {caution}" for caution in section.cautions]
    return [*lines, "", *report.terminal(section, room), ""]


def write(made: ComparisonReport, folder: Path) -> Path:
    """The three files; each replaces an older one at once or not at all. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{NAME}.html"
    atomic_write(folder / f"{NAME}.csv", report.as_csv(made).encode(errors="replace"))
    atomic_write(folder / f"{NAME}.md", report.as_markdown(made).encode(errors="replace"))
    atomic_write(page, report.as_html(made).encode(errors="replace"))
    return page
