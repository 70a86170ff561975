"""Who wins on what, by how much, and how sure that is.

With repeats, cells are compared repeat by repeat: the mean of the log ratios of pairs, with a 95 %
Student t interval whose error is pooled over all cells. With one run each only what scatters within
a run is known: how the speed of a fifth of a run differs from that of the others, and how losses of
single steps do.

Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from smolrun.comparison.cells import Cell
from smolrun.comparison.curve import Point, reached_at
from smolrun.comparison.run_figures import RunFigures
from smolrun.tracking.formatting import counted, duration, rate, size

_WINDOW = 10  # steps that a loss is a mean of; of short runs a fifth
_ONE_RUN_FLOOR = 0.05  # what one run each cannot distinguish: a machine is not that steady
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z = 1.96
_SMALL = 0.1  # a difference below it, and within noise, is called equal


class Strong(str):
    """A part of a sentence that stands out."""

    __slots__ = ()


Sentence = Sequence[str]  # parts, some of them Strong


@dataclass(frozen=True)
class Target:
    """The training loss that all compared runs have reached, as a mean of so many steps."""

    loss: float
    steps: int


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


TIME_TO_LOSS = Metric(
    "time_to_loss_s", "time to loss", seconds, others="takes {} as long", noun="time"
)
TRAIN_LOSS = Metric("final_train_loss", "train loss", _loss, is_loss=True)
EVAL_LOSS = Metric("final_eval_loss", "eval loss", _loss, is_loss=True)
SPEED = Metric(
    "tokens_per_s", "tokens/s", rate, is_more_better=True, others="that of", noun="throughput"
)
WALL = Metric("wall_s", "wall time", seconds)
BYTES = Metric("bytes_sent", "bytes sent", size, others="sends {} as much")
MEMORY = Metric("peak_memory_bytes", "peak memory", size, floor=0.05, others="needs {} as much")
METRICS = (TIME_TO_LOSS, TRAIN_LOSS, EVAL_LOSS, SPEED, WALL, BYTES, MEMORY)


def common_target(cells: Sequence[Cell]) -> Target | None:
    """The lowest loss that every finished run has reached; None where a run never got below its
    first losses, or has too few."""
    runs = [run for cell in cells for run in cell.done.values() if run.curve.points]
    if not runs:
        return None
    steps = max(1, min(_WINDOW, min(run.steps for run in runs) // 5))
    curves = [run.curve.smoothed(steps) for run in runs]
    if not all(curves):
        return None
    loss = max(min(point.loss for point in curve) for curve in curves)
    if any(loss >= curve[0].loss for curve in curves):
        return None
    return Target(loss, steps)


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


def values(metric: Metric, cell: Cell, target: Target | None) -> dict[int, float]:
    """The known figures of a cell's repeats: of the finished ones, if there are any."""
    found = {key: value(metric, run, target) for key, run in (cell.done or cell.runs).items()}
    return {key: number for key, number in found.items() if number is not None}


@dataclass(frozen=True)
class Ratio:
    """How many times as much one cell has as another, and between which limits it may be."""

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
        interval = f" ({low} to {high})" if self.pairs > 1 and low != high else ""
        return f"{_times(self.value)}x{interval}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def ratios(
    rows: Sequence[Mapping[int, float]], noises: Sequence[float], floor: float
) -> list[Ratio]:
    """Every row divided by the first one. `noises`: how much one run of each may differ by chance.

    With repeats that all rows have, the error is that of a randomized block design: what is left of
    the logs without the means of rows and of repeats, over all rows. For two rows that is the
    paired t test; more rows say more about chance, as few repeats say little.
    """
    shared = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
    if len(shared) < 2:
        means = [statistics.fmean(row.values()) for row in rows]
        wide = [max(floor, math.hypot(noise, noises[0])) for noise in noises]
        whole = [mean / means[0] for mean in means]
        return [
            Ratio(one, one / (1 + by), one * (1 + by), 1, floor)
            for one, by in zip(whole, wide, strict=True)
        ]
    logs = [[math.log(row[key]) for key in shared] for row in rows]
    half = _half_width(logs)
    means = [statistics.fmean(row) for row in logs]
    logs_to_first = [mean - means[0] for mean in means]
    return [
        Ratio(_exp(one), _exp(one - half), _exp(one + half), len(shared), floor)
        for one in logs_to_first
    ]


def _half_width(logs: Sequence[Sequence[float]]) -> float:
    """Of the 95 % t interval of the difference of two rows' means."""
    if len(logs) < 2:
        return 0.0
    blocks = [statistics.fmean(column) for column in zip(*logs, strict=True)]
    grand = statistics.fmean(blocks)
    left = [
        value - statistics.fmean(row) - block + grand
        for row in logs
        for value, block in zip(row, blocks, strict=True)
    ]
    degrees = (len(logs) - 1) * (len(blocks) - 1)
    variance = sum(one * one for one in left) / degrees
    return t_quantile(degrees) * math.sqrt(2 * variance / len(blocks))


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
    found: list[tuple[Cell, dict[int, float]]] = []
    for cell in cells:
        finished = Cell(cell.label, cell.differs, cell.done)
        numbers = {k: v for k, v in values(metric, finished, target).items() if v > 0}
        if numbers:
            found.append((finished, numbers))
    seeds = set.intersection(*(set(numbers) for _, numbers in found)) if found else set()
    if len(seeds) > 1:  # as `ratios` compares them
        found = [(cell, {key: numbers[key] for key in seeds}) for cell, numbers in found]
    found.sort(key=lambda row: statistics.fmean(row[1].values()), reverse=metric.is_more_better)
    noises = [noise_of(metric, cell, target) for cell, _ in found]
    rows = [(cell, statistics.fmean(numbers.values())) for cell, numbers in found]
    return Ranking(metric, rows, ratios([numbers for _, numbers in found], noises, metric.floor))


def noise_of(metric: Metric, cell: Cell, target: Target | None) -> float:
    """How much a figure of one run may differ by chance, as a share of it, as far as the run itself
    shows: about two standard deviations."""
    runs = list(cell.runs.values())
    if metric not in (SPEED, TIME_TO_LOSS, WALL) or not runs:
        return 0.0
    speed = max([2 * (run.speed_spread or 0.0) for run in runs])
    of_speed = max(_ONE_RUN_FLOOR / math.sqrt(2), speed)
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
        _about(rank(SPEED, cells, target), "has the highest throughput", unit=" tokens/s"),
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
    many = "both" if sum(bool(cell.done) for cell in cells) == 2 else "all"
    mean = f", as a mean of {target.steps} steps" if target.steps > 1 else ""
    where = f"training loss {target.loss:.3f} (the lowest that {many} have reached{mean})"
    ranking = rank(TIME_TO_LOSS, cells, target)
    wins = f"is fastest to {where}"
    return [*_about(ranking, wins, reach=f"to {where} ", with_last=True), "."]


def _about_bytes(cells: Sequence[Cell], target: Target | None) -> Sentence:
    silent = [c for c in cells if c.done and all(r.bytes_sent == 0 for r in c.done.values())]
    ranking = rank(BYTES, cells, target)
    if not silent:
        return _about(ranking, "sends least")
    names = [Strong(cell.label) for cell in silent[:3]]
    found = [*_joined(names), " sends nothing" if len(names) == 1 else " send nothing"]
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
        names = [*_joined([Strong(cell.label) for cell, _ in rows[1:tied]][:3])]
        names += [" and others"] if tied > 4 else []
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
    repeats = len(set.intersection(*(set(cell.done) for cell in cells)))
    if repeats > 1:
        found = [
            f"How sure: {counted(repeats, 'repeat')} each, compared pair by pair (same seed); in",
            " parentheses the 95 % t interval of the ratio (error pooled over all rows)",
        ]
        if repeats < 5:
            found += ["; ", Strong(f"{repeats} pairs cannot promise much")]
    else:
        speed = max(noise_of(SPEED, cell, target) for cell in cells) * math.sqrt(2)
        many = any(len(cell.done) > 1 for cell in cells)
        found = [
            "How sure: with fewer than two seeds that all jobs have finished, this "
            if many
            else "How sure: with one run each this ",
            Strong(f"cannot say who wins beyond {speed:.0%}".replace("%", " %")),
            " in speed (the spread within a run), and nothing about the loss of other seeds"
            " (sweep.repeats=3)",
        ]
    if tune is not None:
        found += ["; the learning rate is one for all, ", Strong("not tuned per algorithm")]
        found += [f" ({tune} tunes it)"]
    return [*found, "."]
