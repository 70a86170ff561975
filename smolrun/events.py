"""What happened in a run, as frozen structs. The metrics file, the console and W&B
read these.

Events travel from a worker to the driver as JSON objects: `to_json` and `from_json` are the only
two ways in and out, and `check_sender` says which rank may send which. They know nothing of who
reads them."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from smolrun.errors import ProtocolError

# A worker can send anything, so the range of each field is part of its type. A JSON number is exact
# up to here (RFC 8259), which also keeps sums of a few of them in 64 bits.
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
# Seconds, rates, percent; with a bound, so that what is computed from them stays finite.
NonNegative = Annotated[float, Meta(ge=0.0, le=1e18)]
# An error with a large repr in it is longer; the rank's log has all of it.
MAX_TEXT_CHARS = 64 * 1024
Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
Label = Annotated[str, Meta(max_length=100)]  # part of a table's cell


StateOf = Literal["run"]  # whose state a checkpoint keeps
Span = tuple[str, str, Count, float, NonNegative]  # what, lane, step, start_s, duration_s


class Event(msgspec.Struct, frozen=True, tag_field="event", forbid_unknown_fields=True):
    """Base: the tag is the value of the "event" key in metrics.jsonl.

    `sender` says who may send it. "owner": the rank that it is about, or rank 0 where it is about
    the whole run (rank None). "rank 0": about any rank. "driver": no rank."""

    sender: ClassVar[Literal["owner", "rank 0", "driver"]] = "owner"


class StepDone(Event, frozen=True, tag="step"):
    """One optimizer step of the whole run. Loss and tokens are global; bytes and seconds are rank
    0's own.

    `tokens` counts target tokens (or labels) with a loss. `grad_norm` is None when the step was
    skipped. A loss that is not finite arrives as None, because JSON has no word for it."""

    step: Count
    time_s: NonNegative
    loss: float | None
    grad_norm: float | None
    lr: float
    tokens: Count
    tokens_per_s: NonNegative
    bytes_sent: Count
    bytes_received: Count
    compute_s: NonNegative
    wait_s: NonNegative
    rank: None = None


class RankStep(Event, frozen=True, tag="rank_step"):
    """What one rank did during one step; None where this machine cannot tell.

    Bytes are since the last RankStep of this rank, headers included. `waited_for` is the rank that
    was slowest."""

    step: Count
    rank: Count
    compute_s: NonNegative
    wait_s: NonNegative
    waited_for: Count | None
    bytes_sent: Count
    bytes_received: Count
    samples: Count | None = None
    cpu_percent: NonNegative | None = None
    memory_bytes: Count | None = None
    device_memory_bytes: Count | None = None
    device_util: NonNegative | None = None
    temperature_c: float | None = None
    throttled: bool | None = None


class PushApplied(Event, frozen=True, tag="push"):
    """A parameter server has applied one gradient; these events are in order of the updates.

    The gradient of work item `ticket` (part `ticket` mod m of step `ticket` / m, with m pushes a
    step) was computed by `rank` with the weights of `version`, `age` updates ago. `grad_norm` is
    None if it was not finite, and was not applied."""

    sender = "rank 0"

    step: Count
    rank: Count
    ticket: Count
    version: Count
    age: Count
    samples: Count
    grad_norm: float | None


# The reason of a dropped push that a faster link would have brought.
REPLACED = "a newer one took its place"


class PushDropped(Event, frozen=True, tag="push_dropped"):
    """A gradient of work item `ticket` is not applied; the item goes to another rank."""

    sender = "rank 0"

    step: Count
    rank: Count
    ticket: Count
    reason: Text


class Membership(Event, frozen=True, tag="membership"):
    """A rank has joined or left an elastic run; the `tickets` work items that it held go to
    others."""

    sender = "rank 0"

    step: Count
    rank: Count
    is_here: bool
    reason: Text
    tickets: Count


class EvalDone(Event, frozen=True, tag="eval"):
    """Loss over the evaluation split: sum of losses / number of targets, over all ranks.

    `accuracy` is the share of right answers, for classes only."""

    step: Count
    loss: float | None
    tokens: Count
    accuracy: float | None = None
    rank: None = None


class Norms(Event, frozen=True, tag="norms"):
    """Norms layer by layer at one update: of the mean gradient (before clipping), of the parameters
    after it, and of the change."""

    step: Count
    gradients: Mapping[str, float | None]
    parameters: Mapping[str, float | None] | None = None
    updates: Mapping[str, float | None] | None = None
    rank: None = None


class ExpertTokens(Event, frozen=True, tag="expert_tokens"):
    """What the experts of a model got in one step, all ranks together: `tokens[layer][expert]`, and
    how many tokens an expert has dropped for lack of capacity. `imbalance` is the largest number of
    tokens in any layer, as a multiple of that layer's mean: 1 is balanced."""

    step: Count
    tokens: list[list[Count]]
    dropped: Count
    imbalance: NonNegative
    rank: None = None


class ShardSaved(Event, frozen=True, tag="shard_saved"):
    """A rank wrote its part of the checkpoint after `updates` updates; the driver makes the whole.

    `report` is `checkpoints.writer.write_shard`'s, `state` JSON (only rank 0 gives what is true of
    the whole run); `waited_s` is how long training stood still for it."""

    updates: Count
    rank: Count
    report: dict[str, Any]
    state: Mapping[StateOf, dict[str, Any]]
    waited_s: NonNegative
    write_s: NonNegative


class ShardFailed(Event, frozen=True, tag="shard_failed"):
    """A rank could not write its part of the checkpoint after `updates` updates."""

    updates: Count
    rank: Count
    reason: Text


class CheckpointSaved(Event, frozen=True, tag="checkpoint"):
    """A whole checkpoint lies in `folder`; `step` is the last update that is in it.

    `waited_s` is the longest time that training stood still for it on any rank."""

    sender = "driver"

    step: Count
    folder: str
    bytes: Count
    waited_s: NonNegative
    write_s: NonNegative
    rank: None = None


class Timeline(Event, frozen=True, tag="timeline"):
    """What one rank did during a few steps, `step` being the first of them.

    A span is [what, lane, step, start_s, duration_s]; 0 is the same moment on all ranks."""

    step: Count
    rank: Count
    spans: list[Span]


class ReplicaHash(Event, frozen=True, tag="replica_hash"):
    """Hash of the parameters of every replica after a step; equal strings mean equal bytes."""

    step: Count
    hashes: list[str]
    rank: None = None


class Drift(Event, frozen=True, tag="drift"):
    """All replicas became rank 0's; `ranks` are those that had differed from it, by `difference` at
    most in any number. It arrives as None where a replica had a number that is none."""

    step: Count
    difference: float | None
    ranks: list[Count]
    rank: None = None


class StepSkipped(Event, frozen=True, tag="step_skipped"):
    """All ranks skipped one update alike, because some rank's gradient was not finite."""

    step: Count
    ranks: list[Count]
    rank: None = None


class GradientDropped(Event, frozen=True, tag="gradient_dropped"):
    """An update was made without the gradient of `rank`, which was late; the run continues."""

    sender = "rank 0"

    step: Count
    rank: Count
    so_far: Count


class TextSample(Event, frozen=True, tag="sample"):
    """Text the model wrote at the end of training, or before its first step (step 0). `is_answer`:
    the prompt is a question in a conversation."""

    step: Count
    prompt: str
    text: str
    is_answer: bool = False
    rank: None = None


class RunStarted(Event, frozen=True, tag="started"):
    """Rank 0's first word: what is about to be trained."""

    parameters: Count
    steps: Count
    train_size: Count
    eval_size: Count
    device: str
    rank: None = None


class Measured(msgspec.Struct, frozen=True):
    """What every row of task=bench has; how large it was is `bytes` or `parameters`."""

    op: Label
    world_size: Count
    peer: Label
    ours_s: NonNegative
    peer_s: NonNegative
    ratio: NonNegative
    spread: tuple[NonNegative, NonNegative]
    cpu_ratio: NonNegative
    bytes: Count = 0
    parameters: Count = 0


class BenchRow(Event, frozen=True, tag="bench"):
    """One result of task=bench: what was measured, ours beside a peer's, and the ratio."""

    row: dict[str, Any]
    rank: None = None

    def __post_init__(self) -> None:
        """A row that is not as `Measured` says is a ValidationError, as any other field is."""
        msgspec.convert(self.row, Measured)


class Note(Event, frozen=True, tag="note"):
    """A sentence for the user that fits no other event, such as a warning."""

    level: Literal["debug", "info", "warning", "error"]
    message: Text
    rank: Count | None = None


def kind(event: Event | type[Event]) -> str:
    """The value of the key "event"."""
    return str(event.__struct_config__.tag)


EVENTS: dict[str, type[Event]] = {kind(cls): cls for cls in Event.__subclasses__()}
if TYPE_CHECKING:
    AnyEvent = Event
else:
    AnyEvent = functools.reduce(operator.or_, EVENTS.values())  # msgspec wants the union
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(AnyEvent)


def to_json(event: Event) -> dict[str, Any]:
    """The event as one flat JSON object, its kind first under the key "event"."""
    fields: dict[str, Any] = msgspec.to_builtins(event)
    return fields


def from_json(line: bytes | str) -> Event:
    """The event that `to_json` made, as JSON text; raises ProtocolError for anything else."""
    try:
        return _decoder.decode(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not an event: {error}") from None


def from_any_version(line: bytes | str) -> Event | None:
    """As `from_json`, of a line that an earlier or later version may have written: keys that are
    unknown here are left out. None for what is no event even so."""
    with contextlib.suppress(ValueError, RecursionError):
        return _decoder.decode(line)
    try:
        row = msgspec.json.decode(line, type=dict[str, Any])
        fields = EVENTS[row["event"]].__struct_fields__
        known = {key: row[key] for key in row if key in fields or key == "event"}
        return msgspec.convert(known, AnyEvent)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def check_sender(event: Event, sender: int, world_size: int) -> None:
    """Raises ProtocolError unless this rank may send this event.

    A rank speaks for itself; what is true of the whole run, or of another rank, is rank 0's to
    say. Only ranks that exist may be named: the driver looks them up."""
    about = getattr(event, "rank", None)
    named = [about, getattr(event, "waited_for", None), *getattr(event, "ranks", ())]
    if unknown := [rank for rank in named if rank is not None and rank >= world_size]:
        raise ProtocolError(f"sent {kind(event)!r} about rank {unknown[0]}, which does not exist")
    owner = about if event.sender == "owner" and about is not None else 0
    if event.sender == "driver" or sender != owner:
        who = "only the driver" if event.sender == "driver" else f"only rank {owner}"
        raise ProtocolError(f"sent {kind(event)!r}, which {who} may send")
    if isinstance(event, ShardSaved) and "run" in event.state and sender != 0:
        raise ProtocolError("sent a state of the whole run, which only rank 0 may send")
