"""What a dashboard shows of a run: events and views in, rows and sentences out.

Pure: reads no file and no clock (`now` is any clock in seconds), in bounded memory.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from smolrun.comparison.curve import Curve, Point
from smolrun.events import (
    CheckpointSaved,
    Drift,
    EvalDone,
    Event,
    GradientDropped,
    Membership,
    Note,
    PushApplied,
    PushDropped,
    RankStep,
    RunStarted,
    StepDone,
    StepSkipped,
    from_any_version,
)
from smolrun.log_records import LogRecord
from smolrun.sanitize import one_line
from smolrun.tracking.bottleneck import RunSetup, TimeShares, find_bottleneck, split_waits
from smolrun.tracking.console import Console, is_step_line
from smolrun.tracking.formatting import duration, size
from smolrun.tracking.history import Past
from smolrun.tracking.run_record import PushRecord
from smolrun.tracking.run_view import Chunk, View
from smolrun.ui.rows import ServerState, TableRow, together

_WINDOW = 32  # steps that rates and shares are of
_MOST_RANKS = 1024
_MOST_OPEN_STEPS = 64
_MOST_EVENTS = 500
_MOST_LOG_LINES = 5000
_MAX_TEXT = 400
_VERDICT_EVERY_S = 10.0  # of training
_VERDICT_STEPS = 8
_LATE_STEPS = 20  # so long a rank is called late after a dropped gradient
_QUIET_S, _QUIET_STEPS = 10.0, 10  # without a word, a rank is called silent


@dataclass(frozen=True)
class RunFacts:
    """What is known before the first event. `hosts` by rank; `setup` null: there is no verdict."""

    name: str
    hosts: Sequence[str] = ()
    steps: int | None = None
    unit: str = "tokens"
    setup: RunSetup | None = None
    is_server: bool = False


@dataclass(frozen=True)
class EventLine:
    """`kind`: joined, lost, late, saved, warning, or empty. Without a step: before it was looked
    at."""

    step: int | None
    text: str
    kind: str = ""


@dataclass(frozen=True)
class _Sample:
    """One rank in one step."""

    seconds: float
    times: tuple[float, ...]  # in the order of SHARES
    tokens: float | None
    sent: int
    received: int


@dataclass
class _Rank:
    last: RankStep | None = None
    at: float = 0.0  # when that was read
    grad_norm: float | None = None
    late_at: int | None = None  # the step of its last dropped gradient
    has_left: bool = False
    num_dropped: int = 0
    samples: deque[_Sample] = field(default_factory=lambda: deque(maxlen=_WINDOW))


class RunState:
    """The state of one run, as far as its events and views have said."""

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.state = "running"
        self.view: View | None = None
        self.unreachable: tuple[float, str] | None = None  # since when, and why
        self.server = ServerState()
        # (rank, line, level); without a rank it is the driver's
        self.logs: deque[tuple[int | None, str, str]] = deque(maxlen=_MOST_LOG_LINES)
        self.reset()

    def reset(self) -> None:
        """Forget all events: the file is another one now, or a replay goes elsewhere."""
        facts = self.facts
        self.last: StepDone | None = None
        self.eval_loss: float | None = None
        self.curve, self.rates = Curve(), deque[float](maxlen=_WINDOW)
        self.events: deque[EventLine] = deque(maxlen=_MOST_EVENTS)
        self.unreadable = 0
        self.step_at: float | None = None  # when the last step was read
        self.time_s = 0.0
        self.verdict = ""
        self._ranks: dict[int, _Rank] = {}
        self._open: dict[int, dict[int, RankStep]] = {}
        self._steps: dict[int, StepDone] = {}
        self._seconds: dict[int, float] = {}
        self._said: deque[str] = deque(maxlen=_MOST_EVENTS)
        self._setup = facts.setup
        self._times = _times(facts.setup)
        self._verdict_s: float | None = None
        self._pushes = PushRecord()
        self._text = io.StringIO()
        self._console = Console(steps=facts.steps or 1, world_size=len(facts.hosts) or 1,
                                batch_size=facts.setup.global_batch_size if facts.setup else None,
                                stream=self._text)  # fmt: skip
        self._console.unit = facts.unit

    def apply(self, view: View, now: float) -> None:
        """A look at the run."""
        self.view, self.state, self.unreachable = view, view.state, None
        if view.past is not None:
            self.reset()
            self.add_past(view.past)
        self.add_lines(view.metrics.lines, now)
        self._add_log(view.log)
        if view.server is not None:
            self.server.add(view.server, now)

    def add_past(self, past: Past) -> None:
        """What came before the first line."""
        for step in past.steps:
            loss = math.nan if step.loss is None else step.loss
            self.curve.add(Point(step.step, step.time_s, 0, 0, loss))
        for at, line in past.events:
            if (event := from_any_version(line)) is not None:
                self._add_event(event, at)
        if past.steps:
            self.time_s = past.steps[-1].time_s

    def add_lines(self, lines: Iterable[str], now: float) -> None:
        """New lines of metrics.jsonl."""
        for line in lines:
            event = from_any_version(line)
            if event is None:
                self.unreadable += 1
            else:
                self.record(event, now)

    def lost_contact(self, reason: str, now: float) -> None:
        """The machine that drives the run does not answer."""
        since = self.unreachable[0] if self.unreachable else now
        self.unreachable = since, one_line(reason)[:_MAX_TEXT]

    def record(self, event: Event, now: float) -> None:
        """One event."""
        if self._times is not None:
            self._times.record(event)
        if isinstance(event, StepDone):
            self._add_step(event, now)
        elif isinstance(event, RankStep):
            if (rank := self._rank(event.rank)) is not None:
                rank.last, rank.at, rank.has_left = event, now, False
                self._open.setdefault(event.step, {})[event.rank] = event
                self._close(event.step)
        elif isinstance(event, PushApplied):
            self._pushes.record(event)
            if (rank := self._rank(event.rank)) is not None:
                rank.grad_norm = event.grad_norm
        else:
            self._add_event(event, self.last.step + 1 if self.last else 0)

    def _rank(self, number: int) -> _Rank | None:
        if number not in self._ranks and len(self._ranks) >= _MOST_RANKS:
            return None  # a damaged file
        return self._ranks.setdefault(number, _Rank())

    def _add_step(self, event: StepDone, now: float) -> None:
        if self.last is not None and event.time_s > self.last.time_s:
            seconds = event.time_s - self.last.time_s
            self._seconds[event.step] = seconds
            self.rates.append(event.tokens / seconds)
        self.last, self.step_at, self.time_s = event, now, event.time_s
        self._steps[event.step] = event
        loss = math.nan if event.loss is None else event.loss
        self.curve.add(Point(event.step, event.time_s, 0, 0, loss))
        self._close(event.step)
        while len(self._steps) > _MOST_OPEN_STEPS:
            old = min(self._steps)
            self._close(old, is_last=True)
            self._steps.pop(old, None)
            self._seconds.pop(old, None)
        while len(self._open) > _MOST_OPEN_STEPS:
            self._open.pop(min(self._open))
        self._judge(event)

    def _close(self, step: int, *, is_last: bool = False) -> None:
        """Take up a step that all ranks have reported, and the run as a whole."""
        rows, done = self._open.get(step), self._steps.get(step)
        is_whole = rows is not None and len(rows) >= max(1, len(self.facts.hosts))
        if done is None or rows is None or not (is_whole or is_last):
            return
        del self._open[step], self._steps[step]
        seconds = self._seconds.pop(step, 0.0)
        samples = sum(row.samples or 0 for row in rows.values())
        per_sample = done.tokens / samples if samples else None
        for number, times in _split(rows, self._setup).items():
            row, rank = rows[number], self._ranks[number]
            whole = max(seconds, sum(times))
            tokens = row.samples * per_sample if row.samples is not None and per_sample else None
            parts = (*times, whole - sum(times))
            rank.samples.append(_Sample(whole, parts, tokens, row.bytes_sent, row.bytes_received))

    def _judge(self, event: StepDone) -> None:
        """The verdict on the last few seconds of training."""
        if self._times is None or self._setup is None:
            self.verdict = self._pushes.line
            return
        recent = self._times.recent
        if self._verdict_s is None or not self.verdict:
            self._verdict_s = event.time_s
        is_due = event.time_s >= self._verdict_s + _VERDICT_EVERY_S
        if self.verdict and not (is_due and recent.steps >= _VERDICT_STEPS):
            return
        if (found := find_bottleneck(recent, self._setup)) is not None:
            self.verdict = one_line(found.line)
            if is_due:
                self._verdict_s = event.time_s
                self._times.take_recent()

    def _add_event(self, event: Event, step: int) -> None:
        if isinstance(event, RunStarted) and self._setup is not None:
            can = self._setup.can_use_bf16 and event.device != "cpu"
            self._setup = dataclasses.replace(self._setup, can_use_bf16=can)
        elif isinstance(event, EvalDone):
            self.eval_loss = event.loss
        elif isinstance(event, Membership) and (rank := self._rank(event.rank)) is not None:
            rank.has_left = not event.is_here
        elif isinstance(event, GradientDropped | PushDropped):
            self._add_dropped(event)
        step = getattr(event, "step", step - 1) + 1
        for text in self._texts(event):
            self._add_text(step, text, _kind(event))

    def _add_dropped(self, event: GradientDropped | PushDropped) -> None:
        if isinstance(event, PushDropped):
            self._pushes.record(event)
        if (rank := self._rank(event.rank)) is not None:
            rank.late_at = event.step
            rank.num_dropped += 1

    def _texts(self, event: Event) -> list[str]:
        """As the console prints it."""
        if isinstance(event, CheckpointSaved):
            took = f", training waited {duration(event.waited_s)}" if event.waited_s >= 0.05 else ""
            return [f"saved {event.folder} ({size(event.bytes)}{took})"]
        self._text.seek(0)
        self._text.truncate()
        self._console.record(event)
        return self._text.getvalue().splitlines()

    def _add_text(self, step: int, text: str, kind: str) -> None:
        text = one_line(text)[:_MAX_TEXT]
        if text not in self._said:  # the driver's log and the metrics say the same
            self._said.append(text)
            self.events.append(EventLine(step, text, kind))

    def _add_log(self, log: Chunk) -> None:
        """What the driver's log has beside the events; when it was said is known of new lines."""
        texts = [one_line(line).strip()[:_MAX_TEXT] for line in log.lines if not is_step_line(line)]
        new = [text for text in dict.fromkeys(texts) if text and text not in self._said]
        shown = [text for text in new if not text.startswith("where the time goes")]
        step = None if log.is_fresh or self.last is None else self.last.step + 1
        events = [EventLine(step, text, _kind_of_line(text)) for text in shown]
        self._said += new
        if log.is_fresh:
            self.events.extendleft(reversed(events))
        else:
            self.events += events

    def add_record(self, record: LogRecord) -> None:
        """A line of the logs."""
        host, level = one_line(record.host), record.level or ""
        of = f"rank {record.rank}" if record.rank is not None else "driver"
        text = f"{of} {host} {record.time.astimezone():%H:%M:%S} {record.message}"
        self.logs.append((record.rank, one_line(text)[:_MAX_TEXT], level))

    @property
    def steps(self) -> int | None:
        """How many the run is to have."""
        said = self.view.driver.get("steps") if self.view else None
        return said or self.facts.steps

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self.view is not None and self.view.has_ended

    @property
    def tokens_per_s(self) -> float | None:
        """Over the last steps; single ones come in bursts."""
        inverse = sum(1 / rate for rate in self.rates if rate > 0)
        return len(self.rates) / inverse if inverse else None

    @property
    def left_s(self) -> float | None:
        """Until the last step."""
        if self.last is None or self.steps is None or self.has_ended:
            return None
        return self.last.time_s / (self.last.step + 1) * max(0, self.steps - self.last.step - 1)

    def quiet_s(self, now: float) -> float:
        """Seconds without a step, if that is long for this run; else 0."""
        if self.last is None or self.step_at is None or self.has_ended:
            return 0.0
        usual_s = self.last.time_s / (self.last.step + 1)
        quiet_s = now - self.step_at
        return quiet_s if quiet_s > max(_QUIET_S, _QUIET_STEPS * usual_s) else 0.0

    @property
    def slow_rank(self) -> int | None:
        """The one that the others wait for."""
        if self._times is None or self._setup is None:
            return None
        found = find_bottleneck(self._times.run, self._setup)
        return found.slow_rank if found else None

    def rows(self, now: float) -> list[TableRow]:
        """All ranks together, then each; of a server its stages."""
        if self.facts.is_server:
            word = "unknown" if self.unreachable else self.state if self.has_ended else None
            rows, last, speed = self.server.rows(word), None, None
        else:
            rows, last, speed = self._rank_rows(now), self.last, self.tokens_per_s
        return [together(rows, last, speed), *rows] if len(rows) > 1 else rows

    def _rank_rows(self, now: float) -> list[TableRow]:
        known = {*range(len(self.facts.hosts)), *self._ranks}
        reported = [rank.last.step for rank in self._ranks.values() if rank.last is not None]
        newest, slow = max(reported, default=0), self.slow_rank
        return [self._row(number, newest, slow, now) for number in sorted(known)]

    def _row(self, number: int, newest: int, slow: int | None, now: float) -> TableRow:
        rank, hosts = self._ranks.get(number, _Rank()), self.facts.hosts
        last, samples = rank.last, rank.samples
        whole_s = sum(sample.seconds for sample in samples)
        tokens = [sample.tokens for sample in samples if sample.tokens is not None]
        sums = [sum(part) for part in zip(*(sample.times for sample in samples), strict=True)]
        return TableRow(
            rank=number,
            host=one_line(hosts[number]) if number < len(hosts) else "?",
            status=self._status(number, rank, newest, slow, now),
            step=last.step + 1 if last else None,
            grad_norm=rank.grad_norm,
            tokens_per_s=sum(tokens) / whole_s if tokens and whole_s else None,
            shares=tuple(part / whole_s for part in sums) if whole_s else (),
            sent=sum(sample.sent for sample in samples) / whole_s if whole_s else None,
            received=sum(sample.received for sample in samples) / whole_s if whole_s else None,
            memory=last.memory_bytes if last else None,
            device_memory=last.device_memory_bytes if last else None,
            temperature_c=last.temperature_c if last else None,
            throttled=bool(last and last.throttled),
            lag=max(0, newest - last.step) if last else None,
            step_s=[sample.times[0] for sample in samples],
        )

    def _status(self, number: int, rank: _Rank, newest: int, slow: int | None, now: float) -> str:
        if self.view is not None and self.view.summary.get("failed_rank") == number:
            return "lost"
        if rank.has_left:
            return "left"
        if self.has_ended:
            return self.state
        if self.unreachable is not None:
            return "unknown"
        if rank.last is None:
            return "starting"
        if self._times is None and now - rank.at > _QUIET_S + self.quiet_s(now):
            return "silent"  # in lockstep all ranks would be
        if rank.last.throttled:
            return "throttled"
        if rank.late_at is not None and newest - rank.late_at < _LATE_STEPS:
            return "late"
        return "slow" if number == slow else "training"


def _times(setup: RunSetup | None) -> TimeShares | None:
    if setup is None or not setup.is_lockstep:
        return None
    return TimeShares(len(setup.hosts), setup.stage_micro_batches)


def _split(rows: dict[int, RankStep], setup: RunSetup | None) -> dict[int, tuple[float, ...]]:
    """Seconds of every rank in one step, in the order of SHARES without the last."""
    if setup is not None and setup.is_lockstep:
        waits = split_waits(rows, setup.stage_micro_batches)
        return {n: (row.compute_s, *waits[n]) for n, row in rows.items()}
    return {n: (row.compute_s, 0.0, 0.0, row.wait_s) for n, row in rows.items()}


def _kind(event: Event) -> str:
    if isinstance(event, Membership):
        return "joined" if event.is_here else "lost"
    if isinstance(event, GradientDropped | PushDropped | StepSkipped | Drift):
        return "late"
    if isinstance(event, CheckpointSaved):
        return "saved"
    is_warning = isinstance(event, Note) and event.level in ("warning", "error")
    return "warning" if is_warning else ""


def _kind_of_line(text: str) -> str:
    return "warning" if text.startswith(("warning", "error", "smolrun:")) else ""
