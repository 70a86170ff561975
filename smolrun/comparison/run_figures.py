"""What a run folder says about its run: configuration, losses, speed, bytes, memory.

The folder may be anybody's, damaged, or of a run that still trains. Every file is read as data,
with limits on size, depth and numbers; what cannot be read is unknown.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta

from smolrun.comparison.curve import MOST_POINTS, Curve, Point
from smolrun.files import open_regular, read_yaml
from smolrun.sanitize import one_line, without_secrets
from smolrun.tracking.bottleneck import split_waits
from smolrun.tracking.formatting import counted
from smolrun.tracking.past_runs import state_of
from smolrun.tracking.run_folder import RunFolder

MAX_METRICS_BYTES = 1 << 30  # of a larger file only the beginning is read
_MAX_LINE_BYTES = 1 << 20
_MOST_KEYS = 2000
_MOST_RANKS = 1024
_MOST_AGES = 4096
_MOST_OPEN_STEPS = 256
_MAX_TEXT = 200
_MAX_VALUE = 1 << 16  # characters of a value of a configuration
_LEAST_S = 1e-3  # less time is a damaged file, and makes no speed
_BLOCKS = 5  # parts of a run whose speeds are compared
# The note of training/load_balancer.py, and that of tracking/jsonl.py from which on rows of single
# ranks are missing.
_SHARES = re.compile(r"batch shares from step (\d{1,15}):", re.ASCII)
_THINNED = re.compile(r"rank_step and push rows: from here on those of every (\d{1,9}) steps only")

# What damaged or hostile YAML raises.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError),
)

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, Meta(ge=0, le=1e12)]
_Rank = Annotated[int, Meta(ge=0, lt=_MOST_RANKS)]
_Loss = Annotated[float, Meta(ge=-1e12, le=1e12)]


# Rows of metrics.jsonl as far as they are compared; unlike events.py, other keys may be there.
class _Step(msgspec.Struct, tag_field="event", tag="step"):
    step: _Count
    time_s: _Seconds
    loss: _Loss | None = None
    tokens: _Count = 0


class _RankStep(msgspec.Struct, tag_field="event", tag="rank_step"):
    step: _Count
    rank: _Rank
    compute_s: _Seconds = 0.0
    wait_s: _Seconds = 0.0
    bytes_sent: _Count = 0
    samples: _Count | None = None
    memory_bytes: _Count | None = None


class _Push(msgspec.Struct, tag_field="event", tag="push"):
    age: _Count
    rank: _Rank = 0


class _PushDropped(msgspec.Struct, tag_field="event", tag="push_dropped"):
    rank: _Rank


class _Eval(msgspec.Struct, tag_field="event", tag="eval"):
    step: _Count
    loss: _Loss | None = None


class _Note(msgspec.Struct, tag_field="event", tag="note"):
    message: str = ""


class _Started(msgspec.Struct, tag_field="event", tag="started"):
    pass


class _Other(msgspec.Struct):
    """Any other event."""

    event: str


_rows = msgspec.json.Decoder(_Step | _RankStep | _Push | _PushDropped | _Eval | _Note | _Started)
_other = msgspec.json.Decoder(_Other)


@dataclass
class RankFigures:
    """Sums over the steps of one rank."""

    compute_s: float = 0.0
    wait_s: float = 0.0  # all of it
    behind_s: float = 0.0  # of it for slower ranks
    network_s: float = 0.0  # of it for the network
    steps: int = 0
    bytes_sent: int = 0
    samples: int = 0
    peak_memory_bytes: int | None = None
    pushes: int = 0  # of its gradients those that a server applied
    dropped: int = 0  # and those that it did not

    @property
    def own_speed(self) -> float:
        """Samples per second of computing, those of dropped gradients too."""
        made = self.samples * (self.pushes + self.dropped) / (self.pushes or 1)
        return (made if self.pushes else self.samples) / self.compute_s


@dataclass
class RunFigures:
    """One run; None is unknown. Texts are safe to show: one line, no control characters."""

    folder: RunFolder
    name: str
    state: str
    config: dict[str, str]  # dotted key -> value as text
    curve: Curve = field(default_factory=Curve)
    ranks: dict[int, RankFigures] = field(default_factory=dict)
    ages: Counter[int] = field(default_factory=Counter)  # of applied gradients -> how many
    eval_loss: float | None = None
    train_loss: float | None = None
    wall_s: float | None = None
    steps: int = 0
    tokens: int = 0
    unit: str = "tokens"  # or "samples"
    new_shares: list[int] = field(default_factory=list)  # steps from which on ranks had others
    training_s: float = 0.0
    world_size: int | None = None
    version: str | None = None  # of smolrun
    emulated: tuple[str, ...] = ()
    diverged: bool = False
    bubble_share: float = 0.0  # of the time of all ranks
    reason: str = ""
    problems: list[str] = field(default_factory=list)  # what could not be read, as sentences

    @property
    def tokens_per_s(self) -> float | None:
        """Over the whole training, evaluations included, as the run itself reports it."""
        is_known = self.tokens and self.training_s >= _LEAST_S
        return self.tokens / self.training_s if is_known else None

    @property
    def step_s(self) -> float | None:
        """Mean over the whole training, evaluations included."""
        return self.training_s / self.steps if self.steps else None

    @property
    def bytes_sent(self) -> int | None:
        """By all ranks together."""
        return sum(rank.bytes_sent for rank in self.ranks.values()) if self.ranks else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """Of the rank that had most."""
        return max((r.peak_memory_bytes or 0 for r in self.ranks.values()), default=0) or None

    @property
    def speed_spread(self) -> float | None:
        """How much the speed of a fifth of the run differs from that of another, as a share of the
        mean: their standard deviation. What measured shares of the batch have changed is no chance,
        so only fifths with the same shares are compared. None for too few steps."""
        points = self.curve.points[1:]  # the first step warms up
        if (size := (len(points) - 1) // _BLOCKS) < 1:
            return None
        ends = [point.step for point in points]
        bounds = [0, *(bisect.bisect_left(ends, step) - 1 for step in self.new_shares), len(points)]
        parts = [_rates(points[max(0, a) : b + 1 : size]) for a, b in itertools.pairwise(bounds)]
        means = [statistics.fmean(part) for part in parts for _ in part]
        rates = itertools.chain(*parts)
        off = [(rate / mean - 1) ** 2 for rate, mean in zip(rates, means, strict=True) if mean > 0]
        degrees = len(off) - sum(bool(part) for part in parts)
        return math.sqrt(sum(off) / degrees) if degrees > 0 else None

    @property
    def own_speeds(self) -> float | None:
        """Tokens per second that the ranks would make if none ever waited: the sum over ranks of
        samples per second of computing. None where ranks do not compute whole samples."""
        made = [rank for rank in self.ranks.values() if rank.samples]
        samples = sum(rank.samples for rank in made)
        if not samples or not self.tokens or any(rank.compute_s < _LEAST_S for rank in made):
            return None
        return self.tokens / samples * sum(rank.own_speed for rank in made)


def _rates(points: Sequence[Point]) -> list[float]:
    """Tokens per second from one point to the next."""
    return [
        (end.tokens - begin.tokens) / (end.time_s - begin.time_s)
        for begin, end in itertools.pairwise(points)
        if end.time_s - begin.time_s >= _LEAST_S
    ]


def read_run(folder: RunFolder, name: str | None = None) -> RunFigures:
    """The figures of a run; never raises for what is in the folder."""
    run = RunFigures(folder, one_line(name or folder.run_id)[:_MAX_TEXT], "unknown", {})
    _read_config(run)
    with contextlib.suppress(OSError, ValueError, TypeError):
        run.state = state_of(folder)
        if run.state == "died" and not folder.driver() and not folder.metrics.exists():
            run.state = "not started"  # a job of a sweep
    if folder.driver().get("unit") == "samples":
        run.unit = "samples"
    _read_metrics(run)
    _read_summary(run, folder.summary())
    return run


def _read_config(run: RunFigures) -> None:
    try:
        content = without_secrets(msgspec.yaml.decode(read_yaml(run.folder.config)))
    except FileNotFoundError:
        run.problems.append("there is no config.yaml")
        return
    except UNREADABLE as error:
        run.problems.append(f"config.yaml cannot be read ({type(error).__name__})")
        return
    if not isinstance(content, dict):
        run.problems.append("config.yaml is not a mapping")
        return
    _flatten(content, "", run.config, depth=0)
    cluster = content.get("cluster")
    hosts = cluster.get("hosts") if isinstance(cluster, dict) else None
    for host in hosts[:_MOST_RANKS] if isinstance(hosts, list) else []:
        if isinstance(host, dict) and isinstance(host.get("emulate"), dict):
            run.emulated += (f"{_text(host.get('name')) or 'a host'} emulates a slower machine",)


def _flatten(value: Any, path: str, found: dict[str, str], depth: int) -> None:
    if isinstance(value, dict) and value and depth < 8:
        for key, inner in value.items():
            _flatten(inner, f"{path}.{key}" if path else str(key), found, depth + 1)
    elif path == "cluster.hosts" and isinstance(value, list):
        # Too long for a table; and `env` of a host may hold private values.
        found[path] = f"{counted(len(value), 'host')} ({_digest(text_of(value))})"
    elif path and len(found) < _MOST_KEYS:
        found[_short(path)] = _short(text_of(value))


def _short(text: str) -> str:
    """One line; a long one is cut, but two that differ stay different."""
    return one_line(
        text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 10]}... {_digest(text)}"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:6]


def text_of(value: Any) -> str:
    """A value of a configuration about as people write it in YAML; what is longer than 64 Ki
    characters, by aliases of aliases, is cut."""
    text = ""
    for piece in _pieces(value):
        text += piece[:_MAX_VALUE]
        if len(text) > _MAX_VALUE:
            break
    return text


def _pieces(value: Any) -> Iterator[str]:
    if value is None or isinstance(value, bool):
        yield {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, float):
        yield f"{value:g}"
    elif isinstance(value, int):
        yield str(value) if abs(value) < 10**18 else "a large integer"
    elif isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield "["
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from _pieces(item)
        yield "]"
    elif isinstance(value, dict):
        yield "{"
        for index, (key, inner) in enumerate(value.items()):
            yield f"{', ' if index else ''}{_text(key)}: "
            yield from _pieces(inner)
        yield "}"
    else:
        yield f"a {type(value).__name__}"


class _Metrics:
    """Sums up the rows of one file."""

    def __init__(self, run: RunFigures) -> None:
        self._run = run
        self._every = 1  # rows of single ranks there are of every so many steps
        self._bytes_sent = 0
        self._open: dict[int, dict[int, _RankStep]] = {}

    def add(self, row: Any) -> None:
        """One row."""
        if isinstance(row, _Step):
            self._add_step(row)
        elif isinstance(row, _RankStep):
            self._add_rank(row)
        elif isinstance(row, _Push):
            self._rank(row.rank).pushes += self._every
            if row.age in self._run.ages or len(self._run.ages) < _MOST_AGES:
                self._run.ages[row.age] += self._every
        elif isinstance(row, _PushDropped):
            self._rank(row.rank).dropped += self._every
        elif isinstance(row, _Eval):
            self._run.eval_loss = row.loss
        elif isinstance(row, _Started):
            self._every = 1  # a resumed run writes all rows again
        elif match := _THINNED.fullmatch(row.message):
            self._every = max(1, int(match[1]))
        elif match := _SHARES.match(row.message):
            self._new_shares(int(match[1]) - 1)

    def finish(self) -> None:
        """At the end of the file."""
        self._run.curve.finish()
        for rows in self._open.values():
            self._split(rows)

    def _new_shares(self, step: int) -> None:
        known = self._run.new_shares
        if len(known) < MOST_POINTS and step > max(known, default=0):
            known.append(step)

    def _add_step(self, row: _Step) -> None:
        run = self._run
        if row.time_s < run.training_s or row.step < run.steps:
            return  # a step made again, after a loss
        run.steps, run.training_s, run.train_loss = row.step + 1, row.time_s, row.loss
        run.tokens += row.tokens
        loss = math.nan if row.loss is None else row.loss
        run.curve.add(Point(row.step, row.time_s, run.tokens, self._bytes_sent, loss))

    def _add_rank(self, row: _RankStep) -> None:
        rank = self._rank(row.rank)
        rank.steps += self._every
        rank.compute_s += row.compute_s * self._every
        rank.wait_s += row.wait_s * self._every
        rank.bytes_sent += row.bytes_sent * self._every
        rank.samples += (row.samples or 0) * self._every
        self._bytes_sent += row.bytes_sent * self._every
        if row.memory_bytes is not None:
            rank.peak_memory_bytes = max(rank.peak_memory_bytes or 0, row.memory_bytes)
        self._open.setdefault(row.step, {})[row.rank] = row
        if len(self._open) > _MOST_OPEN_STEPS:
            self._split(self._open.pop(min(self._open)))

    def _rank(self, number: int) -> RankFigures:
        return self._run.ranks.setdefault(number, RankFigures())

    def _split(self, rows: Mapping[int, _RankStep]) -> None:
        """What the ranks waited for in one step."""
        for rank, times in split_waits(rows, None).items():
            self._run.ranks[rank].behind_s += times.behind_s * self._every
            self._run.ranks[rank].network_s += times.network_s * self._every


def _read_metrics(run: RunFigures) -> None:
    metrics, unreadable = _Metrics(run), 0
    try:
        with open_regular(run.folder.metrics) as file:
            for line in _lines(file, run.problems):
                try:
                    metrics.add(_rows.decode(line))
                except (ValueError, RecursionError):
                    unreadable += not _is_other(line)
    except FileNotFoundError:
        run.problems.append("there is no metrics.jsonl")
    except (OSError, ValueError) as error:
        run.problems.append(f"metrics.jsonl cannot be read ({type(error).__name__})")
    metrics.finish()
    if unreadable:
        run.problems.append(f"{unreadable:,} lines of metrics.jsonl cannot be read")


def _is_other(line: bytes) -> bool:
    """Whether a line is an event that is not compared."""
    with contextlib.suppress(ValueError, RecursionError):
        return _other.decode(line).event not in (
            "step",
            "rank_step",
            "push",
            "push_dropped",
            "eval",
        )
    return False


def _lines(file: BinaryIO, problems: list[str]) -> Iterator[bytes]:
    """Whole lines; the last one may still be written, and what is longer than any row is left
    out."""
    taken = 0
    while line := file.readline(_MAX_LINE_BYTES):
        taken += len(line)
        if taken > MAX_METRICS_BYTES:
            problems.append(f"of metrics.jsonl only the first {MAX_METRICS_BYTES >> 30} GiB count")
            return
        if line.endswith(b"\n"):
            yield line
        else:
            taken += _skip_line(file)


def _skip_line(file: BinaryIO) -> int:
    taken = 0
    while (rest := file.readline(_MAX_LINE_BYTES)) and taken < MAX_METRICS_BYTES:
        taken += len(rest)
        if rest.endswith(b"\n"):
            break
    return taken


def _read_summary(run: RunFigures, summary: Mapping[str, Any]) -> None:
    run.wall_s = _number(summary.get("wall_s"))
    run.diverged = summary.get("diverged") is True
    run.reason = _text(summary.get("reason"))
    size = summary.get("world_size")
    run.world_size = size if isinstance(size, int) and 0 < size <= _MOST_RANKS else None
    versions = summary.get("versions")
    if isinstance(versions, dict):
        run.version = _text(versions.get("smolrun"))[:30] or None
    emulated = summary.get("emulated")
    if isinstance(emulated, list) and emulated:
        run.emulated = tuple(_text(line) for line in emulated[:_MOST_RANKS])
    peaks = summary.get("peak_memory_bytes")
    for rank, peak in enumerate(peaks[:_MOST_RANKS] if isinstance(peaks, list) else []):
        if (number := _number(peak)) is not None and number > 0:
            one = run.ranks.setdefault(rank, RankFigures())  # the peak of the last start only
            one.peak_memory_bytes = max(one.peak_memory_bytes or 0, int(number))
    time = summary.get("time")
    if isinstance(time, dict):
        run.bubble_share = min(1.0, _number(time.get("pipeline_bubble")) or 0.0)
    if run.train_loss is None and run.state != "running":
        run.train_loss = _number(summary.get("final_train_loss"))
    if run.eval_loss is None:
        run.eval_loss = _number(summary.get("final_eval_loss"))


def _number(value: Any) -> float | None:
    """A finite number that is not negative and not absurd."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < 1e18 else None


def _text(value: Any) -> str:
    return one_line(value)[:_MAX_TEXT] if isinstance(value, str) else ""
