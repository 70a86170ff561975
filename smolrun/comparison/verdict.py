"""Who wins on what, by how much, and how sure that is.

With repeats, the log of a figure is that of its cell plus that of its seed plus chance, fitted by
least squares; a ratio has a 95 % Student t interval whose error is pooled over all cells. With one
run each only what scatters within a run is known: how the speed of a fifth of a run differs from
that of the others, and how losses of single steps do.

Pure.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from smolrun.comparison.cells import Cell, Repeat, unit_of
from smolrun.comparison.curve import Point, reached_at
from smolrun.comparison.run_figures import RunFigures
from smolrun.tracking.formatting import counted, duration, rate, size

_WINDOW = 10  # steps that a loss is a mean of; of short runs a fifth
_ONE_RUN_FLOOR = 0.05  # what one run each cannot distinguish: a machine is not that steady
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z = 1.96
_NOT_KNOWN = 1e6  # instead of it, for runs of a few steps: any difference may be chance
_MOST_NAMES = 3
_FEW_PAIRS = 5
_SMALL = 0.1  # a difference below it, and within noise, is called equal
# A cell whose loss falls by less than this share of what that of the median cell does sets no
# loss for all: it would be an easy one.
_LEARNS = 0.9
_EASY = 0.5  # a loss is, if the best cell's falls by more than twice as much
_MOST_ROUNDS = 500  # of the least squares; each is a pass over all runs
_CLOSE = 1e-9


class Strong(str):
    """A part of a sentence that stands out."""

    __slots__ = ()


Sentence = Sequence[str]  # parts, some of them Strong


@dataclass(frozen=True)
class Target:
    """The training loss up to which times are compared, as a mean of so many steps. `best`: that
    of the best cell, where the loss is an easy one beside it."""

    loss: float
    steps: int
    best: float | None = None


@dataclass(frozen=True)
class Metric:
    """A figure of a run. Differences below `floor` are called equal."""

    key: str
    title: str
    show: Callable[[float], str]
    is_more_better: bool = False
    is_loss: bool = False
    floor: float = 0.01
    others: str = ""  # how another one is beside the best: `takes {} as long`
    noun: str = ""  # in a sentence, where that is not the title


def seconds(value: float) -> str:
    """Seconds as people say them, with enough digits to compare."""
    return (
        f"{value:.3g} s" if value < 100 else duration(value) if value >= 3600 else f"{value:.0f} s"
    )


def _loss(value: float) -> str:
    return f"{value:.3f}"


NOT_REACHED = "not reached"
TIME_TO_LOSS = Metric(
    "time_to_loss_s", "time to loss", seconds, others="takes {} as long", noun="time"
)
TRAIN_LOSS = Metric("final_train_loss", "train loss", _loss, is_loss=True)
EVAL_LOSS = Metric("final_eval_loss", "eval loss", _loss, is_loss=True)
SPEED = Metric(
    "tokens_per_s", "tokens/s", rate, is_more_better=True, others="that of", noun="throughput"
)
STEP = Metric("step_s", "time per step", seconds)
WALL = Metric("wall_s", "wall time", seconds)
BYTES = Metric("bytes_sent", "bytes sent", size, others="sends {} as much")
MEMORY = Metric("peak_memory_bytes", "peak memory", size, floor=0.05, others="needs {} as much")
METRICS = (TIME_TO_LOSS, TRAIN_LOSS, EVAL_LOSS, SPEED, STEP, WALL, BYTES, MEMORY)


def common_target(cells: Sequence[Cell]) -> Target | None:
    """The lowest loss that every finished run has reached, but for those of cells that do not
    learn, or clearly less than the median one. None where none learns, or no losses are known."""
    runs = [[run for run in cell.done.values() if run.curve.points] for cell in cells]
    known = [run for some in runs for run in some]
    if not known:
        return None
    steps = max(1, min(_WINDOW, min(run.steps for run in known) // 5))
    curves = [[run.curve.smoothed(steps) for run in some] for some in runs if some]
    firsts = [curve[0].loss for some in curves for curve in some if curve]
    if not firsts:
        return None
    first = statistics.median(firsts)
    lows = [max(map(_lowest, some)) for some in curves]
    falls = sorted(first - low for low in lows if low < first)
    if not falls:
        return None
    enough = _LEARNS * falls[(len(falls) - 1) // 2]  # of two cells the one that learns less
    fall = next(one for one in falls if one >= enough)
    loss = first - fall
    learning = [some for some, low in zip(curves, lows, strict=True) if low <= loss]
    if any(curve[0].loss <= loss for some in learning for curve in some):
        return None
    return Target(loss, steps, min(lows) if fall < _EASY * falls[-1] else None)


def _lowest(curve: Sequence[Point]) -> float:
    return min((point.loss for point in curve), default=math.inf)


def value(metric: Metric, run: RunFigures, target: Target | None) -> float | None:
    """A figure of one run; None where it is unknown."""
    if metric is TIME_TO_LOSS:
        point = reached_at(run.curve.smoothed(target.steps), target.loss) if target else None
        return point.time_s if point else None
    if metric is TRAIN_LOSS:
        return run.train_loss
    if metric is EVAL_LOSS:
        return run.eval_loss
    found: float | None = getattr(run, metric.key)
    return found


def values(metric: Metric, cell: Cell, target: Target | None) -> dict[Repeat, float]:
    """The known figures of a cell's repeats: of the finished ones, if there are any. No time to a
    loss, if one of these has not reached it: the others are the better ones."""
    found = {key: value(metric, run, target) for key, run in (cell.done or cell.runs).items()}
    known = {key: number for key, number in found.items() if number is not None}
    return known if metric is not TIME_TO_LOSS or len(known) == len(found) else {}


@dataclass(frozen=True)
class Ratio:
    """How many times as much one cell has as another, and between which limits it may be. `pairs`:
    seeds that both have, 0 where the limits are not those of repeats."""

    value: float
    low: float
    high: float
    pairs: int
    floor: float

    @property
    def is_sure(self) -> bool:
        """Whether there is a difference, and it is large enough to matter."""
        return not self.low <= 1 <= self.high and abs(math.log(self.value)) >= self.floor

    @property
    def is_small(self) -> bool:
        """Whether a difference that is not sure would be a small one."""
        return abs(math.log(self.value)) < max(_SMALL, self.floor)

    def __str__(self) -> str:
        low, high = _times(self.low), _times(self.high)
        interval = f" ({low} to {high})" if self.pairs and low != high else ""
        return f"{_times(self.value)}x{interval}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


@dataclass(frozen=True)
class Fit:
    """Logs of figures as the sum of one number for the row, one for the repeat, and chance."""

    rows: Sequence[float]
    variance: float  # of chance
    degrees: int  # of freedom of it


def fit(rows: Sequence[Mapping[Repeat, float]]) -> Fit | None:
    """The least squares fit of positive figures; None where they say nothing about chance, or
    there are rows that no common repeats link, however indirectly."""
    columns = dict.fromkeys(key for row in rows for key in row)
    count = sum(len(row) for row in rows)
    degrees = count - len(rows) - len(columns) + 1
    if degrees < 1 or not _are_linked(rows):
        return None
    logs = [{key: math.log(number) for key, number in row.items()} for row in rows]
    of_rows = [0.0] * len(logs)
    of_columns = dict.fromkeys(columns, 0.0)
    for _ in range(_MOST_ROUNDS):  # Gauss and Seidel's; two rounds where every row has all repeats
        before = of_rows
        for key in columns:
            left = [row[key] - one for row, one in zip(logs, before, strict=True) if key in row]
            of_columns[key] = statistics.fmean(left)
        of_rows = [statistics.fmean(row[key] - of_columns[key] for key in row) for row in logs]
        if max(abs(a - b) for a, b in zip(of_rows, before, strict=True)) < _CLOSE:
            break
    left = [
        row[key] - one - of_columns[key]
        for row, one in zip(logs, of_rows, strict=True)
        for key in row
    ]
    return Fit(of_rows, sum(one * one for one in left) / degrees, degrees)


def _are_linked(rows: Iterable[Mapping[Repeat, float]]) -> bool:
    groups: list[set[Repeat]] = []
    for row in rows:
        apart = [group for group in groups if not group & row.keys()]
        joined = [group for group in groups if group & row.keys()]
        groups = [*apart, set(row).union(*joined)]
    return len(groups) == 1


def ratios(
    rows: Sequence[Mapping[Repeat, float]], noises: Sequence[float], floor: float
) -> list[Ratio]:
    """Every row divided by the first one. `noises`: how much one run of each may differ by chance.

    With repeats, the error is that of a randomized block design, over all rows. For two rows that
    is the paired t test; more rows say more about chance, as few repeats say little.
    """
    if (found := fit(rows)) is None:
        means = [statistics.fmean(row.values()) for row in rows]
        wide = [max(floor, math.hypot(noise, noises[0])) for noise in noises]
        whole = [mean / means[0] for mean in means]
        return [
            Ratio(one, one / (1 + by), one * (1 + by), 0, floor)
            for one, by in zip(whole, wide, strict=True)
        ]
    made = []
    for row, log in zip(rows, found.rows, strict=True):
        pairs = len(row.keys() & rows[0].keys())
        # Rows that only others link: as if by one of these, which has one repeat of each.
        error = math.sqrt(2 * found.variance / (pairs or 0.5))
        half, one = t_quantile(found.degrees) * error, log - found.rows[0]
        made.append(Ratio(_exp(one), _exp(one - half), _exp(one + half), max(1, pairs), floor))
    return made


def _exp(value: float) -> float:
    return math.exp(max(-50.0, min(50.0, value)))


def t_quantile(degrees: int) -> float:
    """Student's t, 97.5 %."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    return _Z + (_Z**3 + _Z) / (4 * degrees) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)


@dataclass(frozen=True)
class Ranking:
    """The cells by one figure, best first, and how many times the best one's each has."""

    metric: Metric
    rows: Sequence[tuple[Cell, float]]  # with the mean over repeats
    ratios: Sequence[Ratio]

    @property
    def tied(self) -> int:
        """How many may be as good as the best one, itself included: those before the first that is
        surely worse."""
        worse = (n for n, one in enumerate(self.ratios) if n and one.is_sure)
        return next(worse, len(self.rows))


def rank(metric: Metric, cells: Sequence[Cell], target: Target | None) -> Ranking:
    """The finished cells that have a positive figure."""
    found: list[tuple[Cell, dict[Repeat, float]]] = []
    for cell in cells:
        finished = Cell(cell.label, cell.differs, cell.done)
        numbers = {k: v for k, v in values(metric, finished, target).items() if v > 0}
        if numbers:
            found.append((finished, numbers))
    levels = [statistics.fmean(numbers.values()) for _, numbers in found]
    if (fitted := fit([numbers for _, numbers in found])) is not None:
        levels = list(fitted.rows)
        # What is shown is of the repeats that decide: a seed that no other row has says nothing.
        count = Counter(key for _, numbers in found for key in numbers)
        found = [(cell, {k: v for k, v in row.items() if count[k] > 1}) for cell, row in found]
    order = sorted(range(len(found)), key=levels.__getitem__, reverse=metric.is_more_better)
    found = [found[place] for place in order]
    noises = [noise_of(metric, cell, target) for cell, _ in found]
    rows = [(cell, statistics.fmean(numbers.values())) for cell, numbers in found]
    return Ranking(metric, rows, ratios([numbers for _, numbers in found], noises, metric.floor))


def noise_of(metric: Metric, cell: Cell, target: Target | None) -> float:
    """How much a figure of one run may differ by chance, as a share of it, as far as the run itself
    shows: about two standard deviations."""
    runs = list(cell.done.values())
    if metric not in (SPEED, TIME_TO_LOSS, STEP, WALL) or not runs:
        return 0.0
    spreads = [run.speed_spread for run in runs]
    known = [2 * spread for spread in spreads if spread is not None]
    of_speed = max(_ONE_RUN_FLOOR / math.sqrt(2), *known) if known else _NOT_KNOWN
    if metric is not TIME_TO_LOSS or target is None:
        return of_speed
    return math.hypot(of_speed, max(_loss_noise(run, target) for run in runs))


def _loss_noise(run: RunFigures, target: Target) -> float:
    """How much earlier or later the target may be reached where its mean loss is off by twice its
    standard error, as a share of the time."""
    points = run.curve.smoothed(target.steps)
    off = 2 * run.curve.scatter(target.steps)
    here = reached_at(points, target.loss)
    if here is None or here.time_s <= 0:
        return 0.0
    ends = [reached_at(points, target.loss + change) for change in (off, -off)]
    return max((abs(_share(end, here)) for end in ends if end is not None), default=0.0)


def _share(point: Point, of: Point) -> float:
    return point.time_s / of.time_s - 1


def verdict(cells: Sequence[Cell], target: Target | None, tune: str | None) -> list[Sentence]:
    """A sentence each: time to a loss, throughput, bytes, memory, and how sure that is."""
    compared = [cell for cell in cells if cell.done]
    if len(compared) < 2:
        return [_nothing(cells, compared)]
    parts: list[Sentence] = [
        _about(
            rank(SPEED, cells, target), "has the highest throughput", unit=f" {unit_of(cells)}/s"
        ),
        _about_bytes(cells, target),
        _about(rank(MEMORY, cells, target), "needs least memory on its largest rank"),
    ]
    known = [[*part, "."] for part in parts if part]
    return [_time_sentence(cells, target), *known, _how_sure(compared, target, tune)]


def _nothing(cells: Sequence[Cell], compared: Sequence[Cell]) -> Sentence:
    if not compared:
        return ["No run here has finished, so there is nothing to compare yet."]
    label = Strong(compared[0].label)
    if len(cells) > 1:
        return ["Only ", label, " has finished, so there is no winner."]
    repeats = len(compared[0].done)
    if repeats == 1:
        return ["There is one run only: name another one beside ", label, " to compare."]
    what = f"All {repeats} runs have the same configuration but for the seed"
    return [f"{what}, so the table shows how much chance alone changes, and there is no winner."]


def _time_sentence(cells: Sequence[Cell], target: Target | None) -> Sentence:
    if target is None:
        return [
            "There is no training loss that all of them have reached, so time to a loss is not",
            " compared.",
        ]
    ranking = rank(TIME_TO_LOSS, cells, target)
    there = {cell.label for cell, _ in ranking.rows}
    late = [Strong(cell.label) for cell in cells if cell.done and cell.label not in there]
    mean = f", as a mean of {target.steps} steps" if target.steps > 1 else ""
    reached = f"training loss {target.loss:.3f}"
    if len(there) == 1:
        [(best, took)] = ranking.rows
        what = f" has reached {reached} (its lowest{mean}), in {TIME_TO_LOSS.show(took)}: "
        return [
            "Only ",
            Strong(best.label),
            what,
            *_few(late),
            f" learn{'s' * (len(late) == 1)} less.",
        ]
    who = (
        f"{len(there)} of {len(there) + len(late)}"
        if late
        else "both"
        if len(there) == 2
        else "all"
    )
    where = f"{reached} (the lowest that {who} have reached{mean})"
    wins = f"is fastest to {where}"
    found = _about(ranking, wins, reach=f"to {where} ", with_last=True)
    if target.best is not None:
        found.append(f"; it is an easy loss, as the best one is {target.best:.3f}")
    return [*found, *(["; ", *_few(late), " did not get there"] if late else []), "."]


def _few(names: Sequence[str]) -> list[str]:
    left = len(names) - _MOST_NAMES
    return _joined([*names[:_MOST_NAMES], f"{left} more"]) if left > 1 else _joined(names)


def _about_bytes(cells: Sequence[Cell], target: Target | None) -> Sentence:
    silent = [c for c in cells if c.done and all(r.bytes_sent == 0 for r in c.done.values())]
    ranking = rank(BYTES, cells, target)
    if not silent:
        return _about(ranking, "sends least")
    names = _few([Strong(cell.label) for cell in silent])
    found = [*names, " sends nothing" if len(silent) == 1 else " send nothing"]
    if len(ranking.rows) == 1:
        [(cell, number)] = ranking.rows
        return [*found, ", ", Strong(cell.label), f" {ranking.metric.show(number)}"]
    rest = _about(ranking, "sends least")
    return [*found, *([", and of the others ", *rest] if rest else [])]


def _about(
    ranking: Ranking, wins: str, unit: str = "", *, reach: str = "", with_last: bool = False
) -> list[str]:
    """`X wins, 5 s: Y takes 1.5x as long`, where Y is the next one that is not equal to X; also of
    the last one. Empty where nothing is known. `reach` stands after the name of the figure."""
    rows, show, tied = ranking.rows, ranking.metric.show, ranking.tied
    if not rows:
        return []
    title = ranking.metric.noun or ranking.metric.title
    if len(rows) == 1:
        return [f"{title} is known of ", Strong(rows[0][0].label), f" only ({show(rows[0][1])})"]
    are_small = all(one.is_small for one in ranking.ratios[1:tied])
    if tied == len(rows):
        numbers = [number for _, number in rows]
        among = f"{show(min(numbers))} to {show(max(numbers))}{unit}"
        if are_small:
            return [Strong(f"{title} {reach}is equal within noise"), f" ({among})"]
        return [f"{title} {reach}has ", Strong("no sure winner"), f" ({among}; all within noise)"]
    best, number = rows[0]
    found: list[str] = [Strong(best.label), f" {wins}, {show(number)}{unit}"]
    if tied > 1:
        names = _few([Strong(cell.label) for cell, _ in rows[1:tied]])
        equal = [*names, " equal within noise"] if are_small else ["not surely before ", *names]
        found += [" (", *equal, ")"]
    found += [": ", *_beside(ranking, tied)]
    if with_last and tied < len(rows) - 1:
        found += [", and ", *_beside(ranking, len(rows) - 1)]
    return found


def _beside(ranking: Ranking, place: int) -> list[str]:
    """Of throughput how many times the best one has, of all else how many times the other has."""
    one, other = ranking.ratios[place], ranking.rows[place][0].label
    if ranking.metric.is_more_better:
        one = Ratio(1 / one.value, 1 / one.high, 1 / one.low, one.pairs, one.floor)
        return [f"{one} {ranking.metric.others} ", other]
    return [other, " ", ranking.metric.others.format(one)]


def _joined(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for index, name in enumerate(names):
        mark = "" if not index else " and " if index == len(names) - 1 else ", "
        found += [mark, name] if mark else [name]
    return found


def _how_sure(cells: Sequence[Cell], target: Target | None, tune: str | None) -> Sentence:
    found: list[str] = []
    if fit([dict.fromkeys(cell.done, 1.0) for cell in cells]) is not None:
        few, most = (find(len(cell.done) for cell in cells) for find in (min, max))
        count = counted(most, "repeat") if few == most else f"{few} to {counted(most, 'repeat')}"
        found += [
            f"How sure: {count} each, compared pair by pair (same seed); in parentheses the 95 % t",
            " interval of the ratio (error pooled over all rows)",
        ]
        if few < _FEW_PAIRS:
            found += ["; ", Strong(f"{counted(few, 'pair')} cannot promise much")]
    else:
        found += _without_repeats(cells, target)
    if tune is not None:
        found += ["; the learning rate is one for all, ", Strong("not tuned per algorithm")]
        found += [f" ({tune} tunes it)"]
    return [*found, "."]


def _without_repeats(cells: Sequence[Cell], target: Target | None) -> Sentence:
    many = any(len(cell.done) > 1 for cell in cells)
    begin = (
        "How sure: with no two seeds that link all jobs" if many else "How sure: with one run each"
    )
    noises = [noise_of(SPEED, cell, target) for cell, _ in rank(SPEED, cells, target).rows]
    widths = [math.hypot(noises[0], noise) for noise in noises[1:] if noise < _NOT_KNOWN]
    if not widths or noises[0] == _NOT_KNOWN:
        about = Strong("cannot say who is faster")
        why = " (runs of so few steps do not show how their speed scatters)"
    else:
        low, high = (f"{find(widths):.0%}".removesuffix("%") for find in (min, max))
        about = Strong(f"cannot say who wins beyond {low if low == high else f'{low} to {high}'} %")
        why = " in speed (the spread within a run)"
    rest = ", and nothing about the loss of other seeds (sweep.repeats=3)"
    return [f"{begin} this ", about, why, rest]
