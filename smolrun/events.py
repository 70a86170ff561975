"""What happened in a run, as frozen dataclasses. Whoever wants to know (metrics file, console, W&B)
reads these.

Events travel from a worker to the driver as JSON objects: `to_json` and `from_json` are the only
two ways in and out. They know nothing of who reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from smolrun.errors import ProtocolError


@dataclass(frozen=True)
class Event:
    """Base: `kind` is the value of the "event" key in metrics.jsonl."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step of the whole run. Loss and tokens are global; bytes and seconds are rank
    0's own.

    `tokens` counts target tokens (or labels) with a loss. `grad_norm` is None when the step was
    skipped. A loss that is not finite arrives as None, because JSON has no word for it."""

    kind: ClassVar[str] = "step"
    step: int
    time_s: float
    loss: float | None
    grad_norm: float | None
    lr: float
    tokens: int
    tokens_per_s: float
    bytes_sent: int
    bytes_received: int
    compute_s: float
    wait_s: float
    rank: None = None


@dataclass(frozen=True)
class RankStep(Event):
    """What one rank did during one step; None where this machine cannot tell.

    Bytes are since the last RankStep of this rank, headers included. `waited_for` is the rank that
    was slowest."""

    kind: ClassVar[str] = "rank_step"
    step: int
    rank: int
    compute_s: float
    wait_s: float
    waited_for: int | None
    bytes_sent: int
    bytes_received: int
    samples: int | None = None
    cpu_percent: float | None = None
    memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    device_util: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None


@dataclass(frozen=True)
class PushApplied(Event):
    """A parameter server has applied one gradient, in this order.

    The gradient of `ticket`'s samples (part `ticket` mod m of step `ticket` / m, with m pushes a
    step) was computed by `rank` with the weights of `version`; `age` updates have come since.
    `grad_norm` is None if it was not finite, and changed nothing."""

    kind: ClassVar[str] = "push"
    step: int
    rank: int
    ticket: int
    version: int
    age: int
    samples: int
    grad_norm: float | None


# The reason of a dropped push that a faster link would have brought.
REPLACED = "a newer one took its place"


@dataclass(frozen=True)
class PushDropped(Event):
    """A gradient will not come, or not from this rank: its ticket goes to somebody else."""

    kind: ClassVar[str] = "push_dropped"
    step: int
    rank: int
    ticket: int
    reason: str


@dataclass(frozen=True)
class Membership(Event):
    """A rank has joined an elastic run, or is gone; the `tickets` that it had go to others."""

    kind: ClassVar[str] = "membership"
    step: int
    rank: int
    is_here: bool
    reason: str
    tickets: int


@dataclass(frozen=True)
class EvalDone(Event):
    """Loss over the evaluation split: sum of losses / number of targets, over all ranks.

    `accuracy` is the share of right answers, for classes only."""

    kind: ClassVar[str] = "eval"
    step: int
    loss: float
    tokens: int
    accuracy: float | None = None
    rank: None = None


@dataclass(frozen=True)
class Norms(Event):
    """Norms layer by layer at one update: of the mean gradient (before clipping), of the parameters
    after it, and of the change."""

    kind: ClassVar[str] = "norms"
    step: int
    gradients: dict[str, float]
    parameters: dict[str, float] | None = None
    updates: dict[str, float] | None = None
    rank: None = None


@dataclass(frozen=True)
class ShardSaved(Event):
    """A rank wrote its part of the checkpoint after `updates` updates; the driver makes the whole.

    `report` is `checkpoints.writer.write_shard`'s, `state` JSON (only rank 0 gives what is true of
    the whole run); `waited_s` is how long training stood still for it."""

    kind: ClassVar[str] = "shard_saved"
    updates: int
    rank: int
    report: dict[str, Any]
    state: dict[str, Any]
    waited_s: float
    write_s: float


@dataclass(frozen=True)
class ShardFailed(Event):
    """A rank could not write its part of the checkpoint after `updates` updates."""

    kind: ClassVar[str] = "shard_failed"
    updates: int
    rank: int
    reason: str


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A whole checkpoint lies in `folder`; `step` is the last update that is in it.

    `waited_s` is the longest time that training stood still for it on any rank."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    folder: str
    bytes: int
    waited_s: float
    write_s: float
    rank: None = None


@dataclass(frozen=True)
class Timeline(Event):
    """What one rank did during a few steps, `step` being the first of them.

    A span is [what, lane, step, start_s, duration_s]; 0 is the same moment on all ranks."""

    kind: ClassVar[str] = "timeline"
    step: int
    rank: int
    spans: list[list[Any]]


@dataclass(frozen=True)
class ReplicaHash(Event):
    """Hash of the parameters of every replica after a step; equal strings mean equal bytes."""

    kind: ClassVar[str] = "replica_hash"
    step: int
    hashes: list[str]
    rank: None = None


@dataclass(frozen=True)
class Drift(Event):
    """All replicas became rank 0's; `ranks` are those that had differed from it, by `difference` at
    most in any number. It arrives as None where a replica had a number that is none."""

    kind: ClassVar[str] = "drift"
    step: int
    difference: float | None
    ranks: list[int]
    rank: None = None


@dataclass(frozen=True)
class StepSkipped(Event):
    """All ranks skipped one update alike, because some rank's gradient was not finite."""

    kind: ClassVar[str] = "step_skipped"
    step: int
    ranks: list[int]
    rank: None = None


@dataclass(frozen=True)
class GradientDropped(Event):
    """An update was made without the gradient of `rank`, which was late; the run goes on."""

    kind: ClassVar[str] = "gradient_dropped"
    step: int
    rank: int
    so_far: int


@dataclass(frozen=True)
class TextSample(Event):
    """Text the model wrote at the end of training."""

    kind: ClassVar[str] = "sample"
    step: int
    prompt: str
    text: str
    rank: None = None


@dataclass(frozen=True)
class RunStarted(Event):
    """Rank 0's first word: what is about to be trained."""

    kind: ClassVar[str] = "started"
    parameters: int
    steps: int
    train_size: int
    eval_size: int
    device: str
    rank: None = None


@dataclass(frozen=True)
class BenchRow(Event):
    """One result of task=bench: what was measured, ours beside a peer's, and the ratio."""

    kind: ClassVar[str] = "bench"
    row: dict[str, Any]
    rank: None = None


@dataclass(frozen=True)
class Note(Event):
    """A sentence for the user that fits no other event, such as a warning."""

    kind: ClassVar[str] = "note"
    level: str
    message: str
    rank: int | None = None


EVENTS: dict[str, type[Event]] = {cls.kind: cls for cls in Event.__subclasses__()}


def to_json(event: Event) -> dict[str, Any]:
    """The event as one flat JSON object, its kind first under the key "event"."""
    return {"event": event.kind, **dataclasses.asdict(event)}


def from_json(data: dict[str, Any]) -> Event:
    """The event that `to_json` made; raises ProtocolError for anything else."""
    fields = dict(data)
    cls = EVENTS.get(str(fields.pop("event", None)))
    if cls is None:
        raise ProtocolError(f"unknown event {data.get('event')!r}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ProtocolError(f"event {cls.kind!r} has wrong fields: {error}") from None
