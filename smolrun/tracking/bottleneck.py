"""Where the time of a run goes: computing, waiting for which rank, network; and what to set.

    rank 0   [ compute 1.0 s ][ wait 1.8 s          ]
    rank 1   [ compute 2.3 s             ][ wait 0.5 ]
                              |<-- 1.3 -->|<-- 0.5 ->|
                            waits for rank 1   network

Per step: no rank can continue before the slowest one has computed, so as much of a rank's wait as
it computed less is waiting for that rank, and the rest is network. Where ranks hold stages of a
model, each also waits while a micro-batch is on the other stages, the bubble of a pipeline: (sum of
all ranks' computing - the slowest one's) / micro-batches. Shares are means over all ranks.
What is neither computing nor waiting (evaluation, data, saving) is other.

Pure: events in, figures and a sentence out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from smolrun.events import Event, RankStep, RunStarted, StepDone

_MOST_OPEN_STEPS = 256  # bounds the memory where a rank sends nothing
# Share of the time from which on there is advice.
_WORTH = 0.1
_FEW_BYTES = 100_000  # a step that sends less waits for its messages, however small they are
_SLOW = 1.1  # as the console's: less is noise
_MOSTLY = 2 / 3  # of all waiting for slower ranks: that one is the slow one, not just unlucky
_THROTTLED = 0.1  # of the steps
_EVERY_S = 60.0  # between two reports


@dataclass(frozen=True)
class RunSetup:
    """The configuration that advice depends on. Per rank: its host, and the key that sets its share
    of the work, None where there is none."""

    hosts: Sequence[str]
    speed_keys: Sequence[str | None]
    speeds: Sequence[float]
    global_batch_size: int
    staleness: int | None = None  # None: this algorithm has none to set
    can_quantize: bool = False  # gradients travel as they are, and need not
    can_use_bf16: bool = False  # the arithmetic is float32 and the device has a faster one
    is_lockstep: bool = True  # else no rank waits for the slowest one
    # Of a step, where ranks hold stages of a model; and what lets these wait less for each other.
    stage_micro_batches: int | None = None
    stage_advice: str | None = None


class RankTime(Protocol):
    """Seconds of one rank in one step; all its waiting is one number."""

    @property
    def compute_s(self) -> float:
        """Computing."""

    @property
    def wait_s(self) -> float:
        """Waiting, whatever for."""


class WaitTime(NamedTuple):
    """What a rank waited for in one step, in seconds."""

    behind_s: float  # for the slowest rank
    bubble_s: float
    network_s: float


def split_waits(
    ranks: Mapping[int, RankTime], stage_micro_batches: int | None
) -> dict[int, WaitTime]:
    """The waiting of every rank in one step, split by cause."""
    slowest_s = max(row.compute_s for row in ranks.values())
    others_s = sum(row.compute_s for row in ranks.values()) - slowest_s
    passing_s = others_s / stage_micro_batches if stage_micro_batches else 0.0

    def split(row: RankTime) -> WaitTime:
        behind_s = min(row.wait_s, slowest_s - row.compute_s)
        bubble_s = min(row.wait_s - behind_s, passing_s)
        return WaitTime(behind_s, bubble_s, row.wait_s - behind_s - bubble_s)

    return {rank: split(row) for rank, row in ranks.items()}


@dataclass
class TimeSums:
    """Seconds, summed over steps; those of one rank by its number."""

    world_size: int
    stage_micro_batches: int | None = None  # None: ranks hold no stages
    steps: int = 0
    total_s: float = 0.0  # over all ranks
    network_s: float = 0.0
    bubble_s: float = 0.0
    bytes_sent: int = 0
    compute_s: dict[int, float] = field(default_factory=dict)
    waited_for_s: dict[int, float] = field(default_factory=dict)
    throttled: dict[int, int] = field(default_factory=dict)  # steps
    hottest_c: dict[int, float] = field(default_factory=dict)

    def add(self, ranks: dict[int, RankStep], duration_s: float) -> None:
        """Add one step, as all ranks reported it."""
        slowest = max(ranks, key=lambda rank: ranks[rank].compute_s)
        waits = split_waits(ranks, self.stage_micro_batches)
        self.steps += 1
        for rank, row in ranks.items():
            self.bubble_s += waits[rank].bubble_s
            _add(self.waited_for_s, slowest, waits[rank].behind_s)
            _add(self.compute_s, rank, row.compute_s)
            # A rank alone has no network: what it spends in collectives is not counted.
            self.network_s += waits[rank].network_s if self.world_size > 1 else 0.0
            self.total_s += max(duration_s, row.compute_s + row.wait_s)
            self.bytes_sent += row.bytes_sent
            _add(self.throttled, rank, 1 if row.throttled else 0)
            if row.temperature_c is not None:
                hottest = self.hottest_c.get(rank, row.temperature_c)
                self.hottest_c[rank] = max(row.temperature_c, hottest)


class TimeShares:
    """A tracker that sums up times: `run` over all steps but the first, which warms up, and
    `recent` since `take_recent`."""

    def __init__(self, world_size: int, stage_micro_batches: int | None = None) -> None:
        self._new_sums = functools.partial(TimeSums, world_size, stage_micro_batches)
        self.run, self.recent = self._new_sums(), self._new_sums()
        self._world_size = world_size
        self._rows: dict[int, dict[int, RankStep]] = {}
        self._durations_s: dict[int, float] = {}
        self._last_time_s: float | None = None

    def record(self, event: Event) -> None:
        """Add a step once all ranks have reported it."""
        if isinstance(event, StepDone):
            if self._last_time_s is not None:
                self._durations_s[event.step] = event.time_s - self._last_time_s
            self._last_time_s = event.time_s
        elif isinstance(event, RankStep):
            self._rows.setdefault(event.step, {})[event.rank] = event
        else:
            return
        self._close(event.step)
        for open_ in (self._rows, self._durations_s):
            if len(open_) > _MOST_OPEN_STEPS:
                open_.pop(min(open_))

    def take_recent(self) -> TimeSums:
        """The sums since the last call."""
        recent, self.recent = self.recent, self._new_sums()
        return recent

    def close(self) -> None:
        """Nothing is buffered."""

    def _close(self, step: int) -> None:
        ranks = self._rows.get(step, {})
        if step in self._durations_s and len(ranks) == self._world_size:
            duration_s = self._durations_s.pop(step)
            self.run.add(self._rows.pop(step), duration_s)
            self.recent.add(ranks, duration_s)


@dataclass(frozen=True)
class Bottleneck:
    """Shares of the time, which add up to 1, and what stands out. Make it by `find_bottleneck`."""

    computing: float
    waiting: float  # for ranks that computed longer
    bubble: float  # while a micro-batch is on other stages
    network: float
    other: float
    slow_rank: int | None  # the one that most of the waiting was for
    slow_factor: float  # its compute time over the mean of the others
    throttled: tuple[int, ...]  # ranks that their machines slowed down
    hottest_c: float | None  # of those
    bytes_per_step: float  # sent by a rank
    bytes_per_s: float
    parts: tuple[tuple[float, str], ...]  # the shares in this order, with words
    advice: str
    line: str

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "computing": round(self.computing, 4),
            "waiting_for_slower_ranks": round(self.waiting, 4),
            "pipeline_bubble": round(self.bubble, 4),
            "network": round(self.network, 4),
            "other": round(self.other, 4),
            "slow_rank": self.slow_rank,
            "slow_factor": round(self.slow_factor, 3),
            "throttled_ranks": list(self.throttled),
            "bytes_sent_per_step": round(self.bytes_per_step),
            "advice": self.advice or None,
        }


def find_bottleneck(sums: TimeSums, setup: RunSetup) -> Bottleneck | None:
    """The shares of the sums; None before the second step, and for algorithms without lockstep."""
    if not sums.steps or sums.total_s <= 0 or not setup.is_lockstep:
        return None
    computing = sum(sums.compute_s.values()) / sums.total_s
    waiting = sum(sums.waited_for_s.values()) / sums.total_s
    network, bubble = sums.network_s / sums.total_s, sums.bubble_s / sums.total_s
    slow_rank, slow_factor = _slow(sums)
    throttled = tuple(r for r, n in sorted(sums.throttled.items()) if n > _THROTTLED * sums.steps)
    found = Bottleneck(
        computing=computing,
        waiting=waiting,
        bubble=bubble,
        network=network,
        other=max(0.0, 1.0 - computing - waiting - bubble - network),
        slow_rank=slow_rank,
        slow_factor=slow_factor,
        throttled=throttled,
        hottest_c=max((sums.hottest_c[r] for r in throttled if r in sums.hottest_c), default=None),
        bytes_per_step=sums.bytes_sent / sums.steps / sums.world_size,
        bytes_per_s=sums.bytes_sent / sums.total_s,
        parts=(),
        advice="",
        line="",
    )
    return _with_words(found, setup)


def _slow(sums: TimeSums) -> tuple[int | None, float]:
    """The rank that most of the waiting was for, and its compute time over that of the others."""
    waited = sum(sums.waited_for_s.values())
    if sums.world_size < 2 or waited <= 0:
        return None, 1.0
    rank = max(sums.waited_for_s, key=lambda rank: sums.waited_for_s[rank])
    others = [seconds for other, seconds in sums.compute_s.items() if other != rank]
    mean = sum(others) / len(others)
    factor = sums.compute_s[rank] / mean if mean > 0 else 1.0
    is_slow = factor >= _SLOW and sums.waited_for_s[rank] >= _MOSTLY * waited
    return (rank, factor) if is_slow else (None, 1.0)


def _with_words(found: Bottleneck, setup: RunSetup) -> Bottleneck:
    parts = [(found.computing, "computing"), (found.waiting, _waiting(found, setup))]
    parts += [(found.bubble, "pipeline bubble"), (found.network, _network(found))]
    parts += [(found.other, "other (data, evaluation, saving)")]
    shares = [f"{share:.0%}".replace("%", " %") + f" {what}" for share, what in parts]
    said = [text for (share, _), text in zip(parts, shares, strict=True) if share >= 0.005]
    advice = _advice(found, setup)
    line = "; ".join([", ".join(said), *([advice] if advice else [])])
    return dataclasses.replace(found, parts=tuple(parts), advice=advice, line=line)


def _waiting(found: Bottleneck, setup: RunSetup) -> str:
    if found.slow_rank is None:
        return "waiting, no single straggler"
    who = _named(found.slow_rank, setup)
    return f"waiting for {who} ({found.slow_factor:.1f}x slower)"


def _network(found: Bottleneck) -> str:
    return f"network ({_amount(found.bytes_per_step)} a step, {_amount(found.bytes_per_s)}/s)"


def _advice(found: Bottleneck, setup: RunSetup) -> str:
    """What to set against the largest share; only keys that this run can set."""
    if found.throttled:
        names = ", ".join(_named(rank, setup) for rank in found.throttled)
        heat = "" if found.hottest_c is None else f" at {found.hottest_c:.0f} °C"
        return f"{names}: throttled by the machine itself{heat}; cool it, or check its power"
    if found.waiting >= max(_WORTH, found.network) and found.slow_rank is not None:
        return _advice_for_slow(found, found.slow_rank, setup)
    if setup.stage_advice is not None and found.bubble >= max(_WORTH, found.network):
        return setup.stage_advice
    if found.network >= _WORTH and setup.stage_advice is not None:
        return "try quantization=int8" if setup.can_quantize else ""
    if found.network >= _WORTH:
        can_hide = setup.staleness == 0 and found.network <= found.computing
        if setup.can_quantize and not can_hide and found.bytes_per_step >= _FEW_BYTES:
            return "try quantization=int8"
        if setup.staleness == 0:
            return "try staleness.bound=1, which hides the network behind the next step"
        return f"try training.global_batch_size={2 * setup.global_batch_size}"
    if found.waiting >= _WORTH and setup.staleness == 0:
        return "try staleness.bound=1, which evens out jitter between ranks"
    if found.computing >= 0.9 and setup.can_use_bf16:
        return "try precision=bf16"
    return ""


def _advice_for_slow(found: Bottleneck, rank: int, setup: RunSetup) -> str:
    key = setup.speed_keys[rank]
    if key is not None:
        return f"try {key}={setup.speeds[rank] / found.slow_factor:.2g}"
    size = len(setup.hosts)
    gain = found.slow_factor * (size - 1) / size  # the others would share its work
    if gain >= _SLOW and setup.stage_advice is None:
        return f"without it the others would be about {gain:.1f}x as fast"
    return ""


def _named(rank: int, setup: RunSetup) -> str:
    host = setup.hosts[rank]
    return f"rank {rank} on {host}" if len(set(setup.hosts)) > 1 else f"rank {rank}"


def _amount(size: float) -> str:
    unit, size = ("MB", size / 1e6) if size >= 0.1e6 else ("kB", size / 1e3)
    return f"{size:.0f} {unit}" if size >= 10 else f"{size:.1f} {unit}"


def _add(sums: dict[int, Any], rank: int, value: float) -> None:
    sums[rank] = sums.get(rank, 0) + value


class TimeReport:
    """A tracker that passes a sentence to `say` every minute of training."""

    def __init__(self, setup: RunSetup, say: Callable[[str], None]) -> None:
        """`setup.can_use_bf16` counts only where the device turns out to be an accelerator."""
        self._setup = setup
        self._say = say
        self._shares = TimeShares(len(setup.hosts), setup.stage_micro_batches)
        self._due_s: float | None = None

    def record(self, event: Event) -> None:
        """Sum up; report once a minute."""
        self._shares.record(event)
        if isinstance(event, RunStarted):
            can = self._setup.can_use_bf16 and event.device != "cpu"
            self._setup = dataclasses.replace(self._setup, can_use_bf16=can)
        elif isinstance(event, StepDone):
            if self._due_s is None:  # a resumed run does not begin at 0
                self._due_s = event.time_s + _EVERY_S
            elif event.time_s >= self._due_s:
                self._due_s = event.time_s + _EVERY_S
                if (recent := find_bottleneck(self._shares.take_recent(), self._setup)) is not None:
                    self._say(f"where the time goes: {recent.line}")

    def close(self) -> None:
        """Nothing is buffered."""

    @property
    def bottleneck(self) -> Bottleneck | None:
        """Of the whole run; None before its second step."""
        return find_bottleneck(self._shares.run, self._setup)

    @property
    def line(self) -> str:
        """The last sentence of a run; empty if there is none."""
        return f"where the time went: {self.bottleneck.line}" if self.bottleneck else ""

    def summary(self) -> dict[str, Any] | None:
        """For summary.json."""
        return self.bottleneck.as_json() if self.bottleneck else None
