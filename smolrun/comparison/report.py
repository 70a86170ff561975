"""A comparison as a page, as Markdown, as CSV, and as a table for the terminal.

Texts of run folders are foreign: each form escapes them in its own way, in one place.
"""

from __future__ import annotations

import csv
import html
import io
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from smolrun.comparison.cells import Cell, short_key, unit_of
from smolrun.comparison.plots import DASHES, Plot
from smolrun.comparison.run_figures import RunFigures
from smolrun.comparison.verdict import (
    METRICS,
    NOT_REACHED,
    TIME_TO_LOSS,
    Metric,
    Sentence,
    Strong,
    Target,
    value,
    values,
)
from smolrun.sanitize import one_line
from smolrun.tracking.formatting import aligned, counted

_MOST_KEYS = 8  # columns of what differs
_CSV_METRICS = (
    *("final_train_loss", "final_eval_loss", "tokens_per_s", "wall_s", "bytes_sent"),
    *("peak_memory_bytes", "time_to_loss_s", "step_s"),
)
_SPOKEN_ROWS, _PAGE_ROWS, _MARKDOWN_ROWS = 20, 50, 200
# Always markup; entities, addresses, issues; `_` beside a word; lists and headings.
_MARKDOWN = re.compile(
    r"[\\`*\[\]<>|~$@]|&(?=[#\w])|:(?=//)|#(?=\d)|(?<![^\W_])_|_(?![^\W_])|^[-+#](?=[\s#])"
)


@dataclass(frozen=True)
class ComparisonTable:
    """Runs whose figures may stand in one table: all emulated, or all real."""

    heading: str  # empty where it is the only one, and real
    keys: Sequence[str]
    cells: Sequence[Cell]  # best first
    metric: Metric
    target: Target | None
    sentences: Sequence[Sentence]
    cautions: Sequence[str]
    plots: Sequence[Plot] = ()
    plot_note: str = ""


@dataclass(frozen=True)
class ComparisonReport:
    """All of a comparison."""

    title: str
    made: str  # when, and by which version
    sections: Sequence[ComparisonTable]
    notes: Sequence[str] = field(default_factory=tuple)


# --- the table ------------------------------------------------------------------------------------


def header(section: ComparisonTable) -> list[str]:
    """The names of the columns; the job comes first."""
    keys = [short_key(key) for key in section.keys[:_MOST_KEYS]]
    first = ["job"] if not keys else []
    return [*first, *keys, "status", *(_title(metric, section) for metric in METRICS)]


def _title(metric: Metric, section: ComparisonTable) -> str:
    return metric.title.replace("tokens", unit_of(section.cells))


def rows(section: ComparisonTable) -> list[list[str]]:
    """A row for every cell: mean and standard deviation of its repeats."""
    return [_row(section, cell) for cell in section.cells]


def _row(section: ComparisonTable, cell: Cell) -> list[str]:
    keys = section.keys[:_MOST_KEYS]
    first = [cell.differs.get(key, "-") for key in keys] or [cell.label]
    return [*first, _status(cell), *(_mean(metric, cell, section.target) for metric in METRICS)]


def _status(cell: Cell) -> str:
    states = [_state(run) for run in cell.runs.values()]
    if len(set(states)) == 1:
        return states[0] if len(states) == 1 else f"{len(states)} x {states[0]}"
    return ", ".join(f"{states.count(one)} {one}" for one in dict.fromkeys(states))


def _state(run: RunFigures) -> str:
    if run.state == "done":
        return "diverged" if run.diverged else "done"
    return f"{run.state}, step {run.steps}" if run.state == "running" else run.state


def _mean(metric: Metric, cell: Cell, target: Target | None) -> str:
    numbers = list(values(metric, cell, target).values())
    if not numbers:
        is_known = metric is TIME_TO_LOSS and target and any(r.steps for r in cell.done.values())
        return NOT_REACHED if is_known else "-"
    text = metric.show(statistics.fmean(numbers))
    if len(numbers) == 1:
        return text
    spread, mean = statistics.stdev(numbers), statistics.fmean(numbers)
    if metric.is_loss or not mean:
        return f"{text} ± {metric.show(spread)}"
    return f"{text} ± {spread / mean:.0%}".replace("%", " %")


def terminal(section: ComparisonTable, room: int | None) -> list[str]:
    """The table as lines; the columns that do not fit are left out, the last ones first."""
    found = rows(section)
    least = max(2, len(section.keys) + 1)
    lines = aligned([header(section), *found[:_SPOKEN_ROWS]], room, least=least)
    left = len(found) - _SPOKEN_ROWS
    return [*lines, *([f"and {counted(left, 'more row')}, in the files"] if left > 0 else [])]


def plain(sentence: Sentence) -> str:
    """A sentence as text."""
    return "".join(sentence)


# --- CSV ------------------------------------------------------------------------------------------


def as_csv(report: ComparisonReport) -> str:
    """A row for every job, repeats apart; numbers with all their digits."""
    keys = list(dict.fromkeys(key for section in report.sections for key in section.keys))
    many = any(len(cell.runs) > 1 for section in report.sections for cell in section.cells)
    mixed = len(report.sections) > 1
    extra = [*(["repeat"] if many else []), *(["emulated"] if mixed else [])]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["job", "status", *(_cell_text(key) for key in keys), *extra, *_CSV_METRICS])
    for section in report.sections:
        for cell in section.cells:
            for repeat, run in cell.runs.items():
                words = [run.name, run.state, *(cell.differs.get(key, "") for key in keys)]
                facts: list[object] = [str(repeat)] if many else []
                facts += [str(cell.is_emulated).lower()] if mixed else []
                numbers = [_number(key, run, section.target) for key in _CSV_METRICS]
                writer.writerow([*map(_cell_text, words), *facts, *numbers])
    return file.getvalue()


def _number(key: str, run: RunFigures, target: Target | None) -> float | str:
    metric = next(metric for metric in METRICS if metric.key == key)
    found = value(metric, run, target)
    return "" if found is None else found


def _cell_text(text: str) -> str:
    """Spreadsheets run a text that begins like a formula, unless it begins with a quote."""
    text = one_line(text)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and text != "-" else text


# --- Markdown -------------------------------------------------------------------------------------


def as_markdown(report: ComparisonReport) -> str:
    """The verdicts and tables; no plots."""
    lines = [f"# {_md(report.title)}", "", _md(report.made), ""]
    lines += [f"- {_md(note)}" for note in report.notes]
    for section in report.sections:
        lines += ["", f"## {section.heading}"] if section.heading else []
        for sentence in section.sentences:
            lines += ["", "".join(_md_part(part) for part in sentence)]
        lines += ["", *(f"- {_md(caution)}" for caution in section.cautions)]
        head = header(section)
        lines += ["", _md_row(head), _md_row(["---"] * len(head))]
        found = rows(section)
        lines += [_md_row([_md(cell) for cell in row]) for row in found[:_MARKDOWN_ROWS]]
        left = len(found) - _MARKDOWN_ROWS
        lines += ["", f"{counted(left, 'more row')}: comparison.html"] if left > 0 else []
        lines += ["", _md(sorting(section)), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _md(text: str) -> str:
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text)).replace("www.", "www\\.")


def _md_part(part: str) -> str:
    return f"**{_md(part)}**" if isinstance(part, Strong) else _md(part)


def _md_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def sorting(section: ComparisonTable) -> str:
    """What the table is sorted by, and what its numbers are."""
    which = "most first" if section.metric.is_more_better else "least first"
    many = any(len(cell.runs) > 1 for cell in section.cells)
    spread = " Numbers are means ± standard deviation over repeats." if many else ""
    left = section.keys[_MOST_KEYS:]
    more = f" Also different: {', '.join(left[:20])}." if left else ""
    return f"Sorted by {_title(section.metric, section)}, {which}; - is unknown.{spread}{more}"


# --- HTML -----------------------------------------------------------------------------------------

_STYLE = (files("smolrun.comparison") / "report.css").read_text(encoding="utf-8")
# Nothing but this page's own style: no scripts, pictures, fonts, frames, forms or connections.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def as_html(report: ComparisonReport) -> str:
    """One page that needs nothing but itself."""
    sections = "\n".join(_html_section(section) for section in report.sections)
    notes = _html_list(report.notes)
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_esc(report.title)} - smolrun</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{_esc(report.title)}</h1>\n<p class="made">{_esc(report.made)}</p>\n'
        f"{notes}{sections}\n</body>\n</html>\n"
    )


def _esc(text: str) -> str:
    return html.escape(one_line(text), quote=True)


def _html_list(items: Sequence[str]) -> str:
    inner = "".join(f"<li>{_esc(item)}</li>" for item in items)
    return f"<ul>{inner}</ul>\n" if inner else ""


def _html_part(part: str) -> str:
    return f"<strong>{_esc(part)}</strong>" if isinstance(part, Strong) else _esc(part)


def _html_section(section: ComparisonTable) -> str:
    heading = f"<h2>{_esc(section.heading)}</h2>\n" if section.heading else ""
    sentences = "".join(
        f"<p>{''.join(_html_part(part) for part in sentence)}</p>" for sentence in section.sentences
    )
    note = f'<p class="note">{_esc(section.plot_note)}</p>\n' if section.plot_note else ""
    plots = "\n".join(_html_plot(plot) for plot in section.plots)
    return (
        f'<section>\n{heading}<div class="verdict">{sentences}</div>\n'
        f"{_html_list(section.cautions)}{_html_table(section)}"
        f'{note}<div class="plots">\n{plots}\n</div>\n</section>'
    )


def _html_table(section: ComparisonTable) -> str:
    head, keys = header(section), max(1, len(section.keys[:_MOST_KEYS])) + 1

    def line(cells: Sequence[str], tag: str) -> str:
        inner = [
            f"<{tag}{' class=key' if n < keys else ''}>{_esc(cell)}</{tag}>"
            for n, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(inner)}</tr>"

    def table(some: Sequence[Sequence[str]]) -> str:
        body = "\n".join(line(row, "td") for row in some)
        return (
            f'<div class="wide"><table>\n<thead>{line(head, "th")}</thead>\n<tbody>\n{body}\n'
            "</tbody>\n</table></div>\n"
        )

    found = rows(section)
    first, rest = found[:_PAGE_ROWS], found[_PAGE_ROWS:]
    more = f"<summary>{counted(len(rest), 'more row')}</summary>\n{table(rest)}" if rest else ""
    return (
        f'{table(first)}<p class="note">{_esc(sorting(section))}</p>\n'
        f"{f'<details>{more}</details>{chr(10)}' if more else ''}"
    )


def _html_plot(plot: Plot) -> str:
    lines = [(f"--s{n}", 3, DASHES[n], label) for n, label in plot.legend]
    lines += [(f"--p{n}", 8, "", label) for n, label in plot.parts]
    legend = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><line x1="0" y1="5" x2="28" y2="5" '
        f'stroke="var({color})" stroke-width="{width}" stroke-dasharray="{dashes}"/>'
        f"</svg>{_esc(label)}</li>"
        for color, width, dashes, label in lines
    )
    keys = f'<ul class="legend">{legend}</ul>\n' if legend else ""
    return (
        f"<figure>\n<h3>{_esc(plot.title)}</h3>\n{plot.svg}\n{keys}"
        f"<figcaption>{_esc(plot.caption)}</figcaption>\n</figure>"
    )
