"""The plots of a comparison, as SVG that stands in the page itself.

One plot is as wide as a phone. Colours are those of the page's style sheet, by variables, so that
they follow dark mode and print; matplotlib draws with placeholders for them. Text stays text.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolrun.comparison.cells import Cell, unit_of
from smolrun.comparison.curve import Axis, Band, Point, band
from smolrun.comparison.run_figures import RunFigures
from smolrun.comparison.verdict import SPEED, Target, values
from smolrun.tracking.formatting import rate, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SERIES = 6  # curves with a color and a dash of their own
_MOST_BARS = 24
_WIDTH, _HEIGHT = 3.6, 2.5  # inches of 72 points: a phone is about 3.6 wide
_SMOOTH = 40  # a curve is smoothed over a so manyth of its steps
_INK, _GRID_INK = "#010203", "#040506"  # placeholders
_SERIES = tuple(f"#0000{index:02x}" for index in range(16, 16 + MOST_SERIES))
_PARTS = tuple(f"#0001{index:02x}" for index in range(16, 20))
DASHES = ("", "6 2", "2 2", "8 2 2 2", "4 4", "1 3")
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a name is a `$`
    "axes.unicode_minus": False,
    "axes.formatter.useoffset": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page sets its own font
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID_INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID_INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Plot:
    """One plot: `svg` is safe to put into a page; `legend` has (index of a series, label)."""

    title: str
    caption: str
    svg: str
    legend: Sequence[tuple[int, str]] = ()
    parts: Sequence[tuple[int, str]] = ()  # of bars: (index of a colour, what)


def can_plot() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw_all(cells: Sequence[Cell], target: Target | None) -> list[Plot]:
    """All plots for which there is something to show; of more cells the first MOST_SERIES.
    ValueError or ArithmeticError for numbers that cannot be drawn, as of a damaged run."""
    shown = [cell for cell in cells if any(run.curve.points for run in cell.runs.values())]
    few = shown[:MOST_SERIES]
    return [
        *_loss_curves(few, target),
        *_speeds(few),
        *_times(few),
        *_memory(few),
        *_ages(few),
    ]


def _figure(draw: Callable[[Axes], None], height: float = _HEIGHT) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of fonts, which are the page's
    settings: Any = mpl.rcParams
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers of a damaged run may be hard to draw
        mpl.rcdefaults()  # not those of the user's other plots
        settings.update(_RC)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        file = io.StringIO()
        names = ("Creator", "Date", "Format", "Type")
        figure.savefig(file, format="svg", metadata=dict.fromkeys(names))
    return _for_page(file.getvalue())


def _for_page(svg: str) -> str:
    """Without the head of a file of its own; colours as variables of the page; ids that are not
    those of another plot."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" aria-hidden="true">',
        svg,
        count=1,
    )
    svg = re.sub(r"<style type=\"text/css\">[^<]*</style>", "", svg)
    svg = (
        svg.replace("xlink:href", "href")
        .replace(_INK, "var(--ink)")
        .replace(_GRID_INK, "var(--grid)")
    )
    for index, placeholder in enumerate(_SERIES):
        svg = svg.replace(placeholder, f"var(--s{index})")
    for index, placeholder in enumerate(_PARTS):
        svg = svg.replace(placeholder, f"var(--p{index})")
    return svg


# --- loss -----------------------------------------------------------------------------------------


def _loss_curves(cells: Sequence[Cell], target: Target | None) -> Iterator[Plot]:
    axes: tuple[tuple[Axis, str, str], ...] = (
        ("time_s", "Loss over time", "seconds of training"),
        ("tokens", "Loss over samples", f"{unit_of(cells)} trained on"),
        ("bytes_sent", "Loss over bytes sent", "bytes sent by all ranks"),
    )
    runs = [run for cell in cells for run in cell.runs.values()]
    steps = max((run.steps for run in runs), default=0)
    smooth = max(target.steps if target else 1, steps // _SMOOTH)
    for axis, title, label in axes:
        bands = [band(_curves(cell, smooth), axis) for cell in cells]
        if axis == "bytes_sent":
            bands = [one if one.x and one.x[-1] > 0 else Band([], [], [], []) for one in bands]
        if not any(one.x for one in bands):
            continue
        many = any(len(cell.runs) > 1 for cell in cells)
        caption = f"Training loss, mean of {smooth} steps" if smooth > 1 else "Training loss"
        caption += "; the band is the range of the repeats" if many else ""
        caption += "; the dotted line is the loss of the verdict" if target else ""
        legend = [(n, cell.label) for n, cell in enumerate(cells) if bands[n].x]
        draw = _curve_drawing(bands, label, target, axis)
        yield Plot(title, f"{caption}.", _figure(draw), legend)


def _curves(cell: Cell, smooth: int) -> list[list[Point]]:
    return [run.curve.smoothed(smooth) for run in cell.runs.values() if run.curve.points]


def _curve_drawing(
    bands: Sequence[Band], label: str, target: Target | None, axis: Axis
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for index, one in enumerate(bands):
            if not one.x:
                continue
            dashes = [float(part) for part in DASHES[index].split()]
            style: Any = (0, tuple(dashes)) if dashes else "solid"
            axes.plot(one.x, one.mean, color=_SERIES[index], linestyle=style)
            if one.low != one.high:
                axes.fill_between(one.x, one.low, one.high, color=_SERIES[index], alpha=0.2, lw=0)
        if target is not None:
            axes.axhline(target.loss, color=_INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel(label)
        axes.set_ylabel("training loss")
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(lambda number, _: _scaled(number))
        if axis == "time_s":
            _tell_time(axes, max(one.x[-1] for one in bands if one.x))

    return draw


def _tell_time(axes: Axes, longest_s: float) -> None:
    """Ticks in the unit of the whole axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for unit, length_s in (("hours", 3600.0), ("minutes", 60.0)):
        if longest_s > 3 * length_s:
            step_s = (MaxNLocator(nbins=5).tick_values(0, longest_s / length_s)[1]) * length_s
            axes.set_xticks([step_s * n for n in range(int(longest_s / step_s) + 1)])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _, n=length_s: f"{x / n:g}"))
            axes.set_xlabel(f"{unit} of training")
            return


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5)


def _scaled(number: float) -> str:
    for unit, length in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= length:
            return f"{number / length:g}{unit}"
    return f"{number:g}"


# --- bars -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bar:
    """One horizontal bar: what it is a part of, in the row above the first of these; its own name;
    its parts as (colour, length); text at its end; a dotted longer bar around it."""

    head: str
    name: str
    parts: Sequence[tuple[str, float]]
    text: str
    outline: float = 0.0

    @property
    def length(self) -> float:
        """All of it."""
        return max(sum(length for _, length in self.parts), self.outline)


def _bars(
    bars: Sequence[_Bar], label: str, show: Callable[[float], str], *, full: float | None = None
) -> str:
    """`full`: a length that no bar exceeds, where the axis ends."""
    longest = full or max(bar.length for bar in bars) or 1.0
    places, heads = _rows_of(bars)

    def draw(axes: Axes) -> None:
        for row, bar in zip(places, bars, strict=True):
            begin = 0.0
            if bar.outline:
                axes.barh(row, bar.outline, 0.7, color="none", edgecolor=_INK, lw=0.8, ls=":")
            for color, length in bar.parts:
                axes.barh(row, length, 0.7, left=begin, color=color)
                begin += length
            axes.text(bar.length + longest * 0.02, row, bar.text, va="center", ha="left")
        for row, text in heads:
            axes.text(0, row, text if len(text) <= 40 else f"{text[:37]}...", va="center")
        axes.set_ylim(places[-1] + 0.7, -0.7)
        axes.set_xlim(0, longest * 1.3)
        axes.set_yticks(places, [bar.name for bar in bars])
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        if full is None:
            axes.xaxis.set_major_locator(_few_ticks())
        else:
            axes.set_xticks([full * part / 4 for part in range(5)])
        axes.xaxis.set_major_formatter(lambda number, _: show(number))
        axes.set_axisbelow(True)

    return _figure(draw, 0.6 + 0.19 * (places[-1] + 1))


def _rows_of(bars: Sequence[_Bar]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where bars and the texts above them are, counted in bars from the top."""
    places: list[float] = []
    heads: list[tuple[float, str]] = []
    row, before = 0.0, ""
    for bar in bars:
        if bar.head != before:
            row += 0.3 if places else 0.0
            heads.append((row, bar.head))
            row, before = row + 1, bar.head
        places.append(row)
        row += 1
    return places, heads


def _speeds(cells: Sequence[Cell]) -> Iterator[Plot]:
    bars = []
    for index, cell in enumerate(cells):
        numbers = values(SPEED, cell, None)
        if not numbers:
            continue
        mean = sum(numbers.values()) / len(numbers)
        own = [run.own_speeds for run in cell.runs.values() if run.own_speeds]
        sum_own = sum(own) / len(own) if own else None
        share = f" ({mean / sum_own:.0%})".replace("%", " %") if sum_own else ""
        parts = [(_SERIES[index], mean)]
        bars.append(_Bar(cell.label, "", parts, f"{rate(mean)}{share}", sum_own or 0.0))
    if bars:
        unit = unit_of(cells)
        caption = f"{unit.capitalize()} per second over the whole training."
        if any(bar.outline for bar in bars):
            caption += (
                " Dotted: the sum of the own speeds of the ranks that train (samples per second of"
                " computing), as if none ever waited; in parentheses how much of that is used."
            )
        yield Plot("Throughput and efficiency", caption, _bars(bars, f"{unit}/s", _scaled))


def _rank_rows(cells: Sequence[Cell]) -> list[tuple[int, Cell, int]]:
    """(index of the cell, cell, rank): as many as can be shown, equally many ranks of each."""
    ranks = [sorted({rank for run in cell.runs.values() for rank in run.ranks}) for cell in cells]
    most = max(1, _MOST_BARS // max(1, len(cells)))
    return [
        (n, cell, rank)
        for n, (cell, some) in enumerate(zip(cells, ranks, strict=True))
        for rank in some[:most]
    ]


def _times(cells: Sequence[Cell]) -> Iterator[Plot]:
    bars = []
    for _, cell, rank in _rank_rows(cells):
        shares = [s for run in cell.runs.values() if (s := time_shares(run, rank)) is not None]
        if shares:
            mean = [sum(part) / len(shares) for part in zip(*shares, strict=True)]
            parts = [(_PARTS[n], share) for n, share in enumerate(mean)]
            bars.append(_Bar(cell.label, f"rank {rank}", parts, f"{mean[0]:.0%}"))
    if bars:
        what = ("computing", "waiting for slower ranks", "network and other waits")
        caption = "Shares of the training time of each rank; the number is computing. The rest is"
        caption += " data, evaluation, saving."
        svg = _bars(bars, "share of the time", lambda number: f"{number:.0%}", full=1.0)
        yield Plot("Where each rank's time goes", caption, svg, parts=list(enumerate(what)))


def time_shares(run: RunFigures, rank: int) -> tuple[float, float, float] | None:
    """Of the training time: computing, waiting for slower ranks, all other waiting."""
    one = run.ranks.get(rank)
    if one is None or run.training_s <= 0 or one.compute_s + one.wait_s <= 0:
        return None
    whole = max(run.training_s, one.compute_s + one.wait_s)
    # Without lockstep no rank waits for a slower one; and a rank alone has no network.
    behind = 0.0 if run.ages else min(one.behind_s, one.wait_s)
    other = one.wait_s - behind if len(run.ranks) > 1 else 0.0
    return one.compute_s / whole, behind / whole, other / whole


def _memory(cells: Sequence[Cell]) -> Iterator[Plot]:
    bars = []
    for index, cell, rank in _rank_rows(cells):
        peaks = [
            peak
            for run in cell.runs.values()
            if rank in run.ranks and (peak := run.ranks[rank].peak_memory_bytes)
        ]
        if peaks:
            mean = sum(peaks) / len(peaks)
            bars.append(_Bar(cell.label, f"rank {rank}", [(_SERIES[index], mean)], size(mean)))
    if bars:
        caption = "Peak memory of each rank's process."
        yield Plot("Memory per rank", caption, _bars(bars, "bytes", _scaled))


def _ages(cells: Sequence[Cell]) -> Iterator[Plot]:
    counted: list[tuple[int, Cell, Mapping[int, float]]] = []
    for index, cell in enumerate(cells):
        ages: dict[int, float] = {}
        for run in cell.runs.values():
            for age, number in run.ages.items():
                ages[age] = ages.get(age, 0) + number
        if total := sum(ages.values()):
            counted.append((index, cell, {age: n / total for age, n in ages.items()}))
    if not counted:
        return
    last = min(60, max(age for _, _, ages in counted for age in ages))

    def draw(axes: Axes) -> None:
        width = 0.8 / len(counted)
        for place, (index, _, ages) in enumerate(counted):
            heights = [ages.get(age, 0.0) for age in range(last)]
            heights.append(sum(share for age, share in ages.items() if age >= last))
            x = [age - 0.4 + width * (place + 0.5) for age in range(last + 1)]
            axes.bar(x, heights, width, color=_SERIES[index])
        axes.set_xlabel("staleness in updates")
        axes.set_ylabel("share of gradients")
        axes.grid(False, axis="x")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(_few_ticks())
        axes.yaxis.set_major_formatter(lambda number, _: f"{number:.0%}")

    caption = "How many updates were made between the weights of a gradient and its own update."
    legend = [(index, cell.label) for index, cell, _ in counted]
    yield Plot("Staleness of gradients", caption, _figure(draw), legend)
