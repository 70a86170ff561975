"""The records of the algorithm contract: what an algorithm is given, what it trains on, and what a
step returns. How they are used is in base.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from smolrun.data.splits import IGNORE_INDEX, Batch
from smolrun.errors import ConfigError, DataError
from smolrun.events import Event
from smolrun.mesh.mesh import Mesh, Work
from smolrun.parts.norms import NO_NORMS, LayerNorms
from smolrun.parts.precision import Precision
from smolrun.parts.quantization import NO_QUANTIZATION, Quantization
from smolrun.parts.step_clock import FULL_SPEED, Pace

# What random numbers are drawn for: the first word of their seed. What a forward draws follows from
# its samples, so ranks differ and resuming needs no state; what an update draws is equal on all
# ranks, so replicas stay equal.
FORWARD, UPDATE = 0, 1

# What every rank reports of a step, as float64 (also the columns of a table in old checkpoints, in
# this order). An algorithm may report more: see Algorithm.step_stats.
STEP_STATS = (
    *("loss_sum", "num_targets", "is_finite"),
    *("compute_s", "wants_stop", "samples", "changed_buffer"),
)

FirstValue = Callable[[torch.nn.Module, str, torch.nn.Parameter], Tensor]
# (logits [..., C], targets [...]): the sum of the losses of all targets that are learnt
LossSum = Callable[[Tensor, Tensor], Tensor]


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross entropies of all targets that carry a loss, on the logits' device."""
    flat, targets = logits.flatten(0, -2), targets.to(logits.device).flatten()
    return cross_entropy(flat, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def own_loss_sum(loss: Callable[[Tensor, Tensor], Any], name: str) -> LossSum:
    """As `loss_sum`, by the user's own `loss(logits [N, C], targets [N])`, which gets targets that
    carry a loss and returns that of each, [N]: so the mean over the targets of all ranks does not
    depend on how a batch is cut. ConfigError where it returns anything else."""

    def own(logits: Tensor, targets: Tensor) -> Tensor:
        flat, targets = logits.flatten(0, -2), targets.to(logits.device).flatten()
        learnt = targets != IGNORE_INDEX
        if not learnt.all():
            flat, targets = flat[learnt], targets[learnt]
        if not len(targets):
            return flat.sum()  # 0, and its gradient too
        return _checked_losses(loss(flat, targets), targets, name).sum()

    return own


def _checked_losses(losses: Any, targets: Tensor, name: str) -> Tensor:
    found = f"a tensor {list(losses.shape)}" if isinstance(losses, Tensor) else _kind(losses)
    if not isinstance(losses, Tensor) or losses.shape != targets.shape:
        raise ConfigError(
            f"model.loss = {name} returned {found} for {len(targets)} targets; it must return the "
            f'loss of each target, a tensor [{len(targets)}] (reduction="none"): smolrun takes the '
            "mean over the targets of all ranks"
        )
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise ConfigError(
            f"model.loss = {name} returned numbers that do not depend on the logits: it must be "
            "differentiable, without argmax, detach() or torch.no_grad()"
        )
    return losses


@dataclass(frozen=True)
class Context:
    """What every algorithm is given."""

    mesh: Mesh
    device: torch.device
    precision: Precision
    make_optimizer: Callable[[Iterable[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]
    learning_rate: Callable[[int], float]  # of update 0, 1, 2, ...
    staleness: int = 0
    staleness_bound: int | None = None  # None: the algorithm's own default
    quantization: Quantization = NO_QUANTIZATION  # how gradients are encoded when they are sent
    grad_clip: float = 0.0  # largest norm of the whole gradient; 0: no clipping
    num_outputs: int | None = None  # classes, or tokens of the vocabulary; None: not known
    expected_weight: int = 1  # targets in a global batch, a hint for the first loss scale
    norms: LayerNorms = NO_NORMS  # which norms to take layer by layer, and how often
    is_elementwise: bool = True  # the optimizer needs no whole matrices, so they may be cut
    shard_weights: tuple[float, ...] = ()  # how much each rank should hold; empty: all alike
    # How fast each rank computes; empty: all alike; None: to be measured, where a model is cut.
    speeds: tuple[float, ...] | None = ()
    memory_bytes: tuple[float, ...] = ()  # what each rank can hold; infinite where not known
    # (model, name, parameter): the value of a parameter that `place` got on the meta device
    first_value: FirstValue = lambda model, name, parameter: parameter.detach()
    pace: Pace = FULL_SPEED  # a rank may emulate a slower machine
    # seeds every random generator of this process from the run's seed and these numbers
    reseed: Callable[..., None] = lambda *words: None
    loss_sum: LossSum = loss_sum


@dataclass(frozen=True)
class BatchPart:
    """One of `count` equal parts of a global batch."""

    index: int
    count: int


IDLE = BatchPart(0, 0)  # for a server that does not train


@dataclass(frozen=True)
class BatchAssignment:
    """What a rank trains on next: of the global batch of `step` its own share, or that part."""

    step: int
    part: BatchPart | None = None


class StepStats:
    """Named numbers of a step, in float64: `table[i, j]` is what `ranks[i]` reports as `names[j]`;
    complete when the works of the step are done. Of all ranks of the algorithm, or, at a step at
    which ranks do not meet, of this rank alone."""

    def __init__(self, names: Sequence[str], ranks: Sequence[int], table: Tensor) -> None:
        self.names = tuple(names)
        self.ranks = list(ranks)
        self.table = table

    @classmethod
    def of_rank(cls, rank: int, values: Mapping[str, float]) -> StepStats:
        """Of one rank."""
        row = torch.tensor([list(values.values())], dtype=torch.float64)
        return cls(tuple(values), [rank], row)

    @classmethod
    def saved(cls, table: Tensor, names: Sequence[str] | None) -> StepStats:
        """Of a checkpoint; older ones do not have the names."""
        return cls(names or STEP_STATS[: table.shape[1]], range(len(table)), table)

    def column(self, name: str) -> list[float]:
        """Of every rank in `ranks`; empty if `name` is not reported."""
        if name not in self.names:
            return []
        found: list[float] = self.table[:, self.names.index(name)].tolist()
        return found

    def of(self, rank: int, name: str) -> float | None:
        """What one rank reports; None where it does not."""
        return dict(zip(self.ranks, self.column(name), strict=False)).get(rank)

    def replace(self, name: str, values: Tensor) -> None:
        """What every rank in `ranks` reports as `name`, where they did not know it at once."""
        self.table[:, self.names.index(name)] = values

    def total(self, name: str) -> float:
        """The sum over ranks."""
        return sum(self.column(name))

    @property
    def slowest(self) -> int:
        """The rank that computed longest."""
        computed_s = self.column("compute_s")
        return self.ranks[max(range(len(computed_s)), key=computed_s.__getitem__)]

    @property
    def nonfinite_ranks(self) -> tuple[int, ...]:
        """Ranks whose own gradient was not finite."""
        are_finite = zip(self.ranks, self.column("is_finite"), strict=True)
        return tuple(rank for rank, is_finite in are_finite if not is_finite)

    def resumed(self, names: Sequence[str], ranks: Sequence[int]) -> StepStats:
        """The same step for other ranks, which resume it from a checkpoint: sums stay sums, no rank
        was slow or asked to stop; samples are known of as many ranks as there were."""
        table = torch.zeros((len(ranks), len(names)), dtype=torch.float64)
        for column, name in enumerate(names):
            found = torch.tensor(self.column(name), dtype=torch.float64)
            if name == "is_finite":
                table[:, column] = found.all()
            elif name == "changed_buffer":  # the oldest checkpoints do not have it: False
                table[:, column] = found.any()
            elif name == "samples":
                both = min(len(found), len(ranks))
                table[:both, column] = found[:both]
            elif name not in ("compute_s", "wants_stop"):
                table[0, column] = found.sum()
        return StepStats(names, ranks, table)


@dataclass(frozen=True)
class EvalSums:
    """Over the samples of all ranks. `correct` counts right answers, for classes only."""

    loss: float
    num_targets: int
    correct: int | None


@dataclass(frozen=True)
class StepResult:
    """One update. `loss` and `num_targets` are of all ranks in `stats`; `grad_norm`
    is None when the update was skipped because it was not finite."""

    step: int
    loss: float
    num_targets: int
    grad_norm: float | None
    learning_rate: float
    compute_s: float
    wait_s: float
    waited_for: int | None  # the rank with the longest compute, if this rank waited for it
    nonfinite_ranks: tuple[int, ...]  # ranks whose own gradient was not finite
    wants_stop: bool  # some rank was asked to stop, and all ranks know
    norms: dict[str, dict[str, float]] | None  # what -> layer -> norm, on the steps that take them
    stats: StepStats
    # rank whose gradient was not waited for -> how many that makes
    late: Mapping[int, int] = field(default_factory=dict)
    events: tuple[Event, ...] = ()  # to emit with it

    @property
    def samples(self) -> tuple[int, ...]:
        """Of every rank in `stats`, in this step."""
        return tuple(int(count) for count in self.stats.column("samples"))

    @property
    def computed_s(self) -> tuple[float, ...]:
        """Seconds that every rank in `stats` computed, the update not counted."""
        return tuple(self.stats.column("compute_s"))


@dataclass
class PendingUpdate:
    """A step whose gradient is being synchronized."""

    step: int
    stats: StepStats
    works: list[Work]
    late: dict[int, int] = field(default_factory=dict)  # as in StepResult

    def result(self, **of_rank: Any) -> StepResult:
        """The update that this has become, with what its rank knows of it."""
        weight = self.stats.total("num_targets")
        return StepResult(
            step=self.step,
            loss=self.stats.total("loss_sum") / weight if weight else math.nan,
            num_targets=int(weight),
            nonfinite_ranks=self.stats.nonfinite_ranks,
            stats=self.stats,
            late=self.late,
            **of_rank,
        )


def never_empty(batch: Batch) -> Batch:
    """The batch, or one sample that does not count; for ranks that must run the model together."""
    if len(batch.inputs):
        return batch
    inputs = batch.inputs.new_zeros((1, *batch.inputs.shape[1:]))
    return Batch(inputs, batch.targets.new_full((1, *batch.targets.shape[1:]), IGNORE_INDEX))


def check_answer(output: Any, batch: Batch, num_outputs: int | None) -> None:
    """ConfigError where a model's output is not what the loss needs for the targets of the batch,
    DataError where the targets are not; `num_outputs` is what the data has, None: not known."""
    targets = batch.targets
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise DataError(f"the targets are {_name(targets.dtype)}; {_TARGETS}")
    if not isinstance(output, Tensor):
        raise ConfigError(f"the model's forward returned {_kind(output)}; {_LOGITS}")
    if not output.is_floating_point():
        raise ConfigError(f"the model's forward returned {_name(output.dtype)} numbers; {_LOGITS}")
    if output.ndim != targets.ndim + 1 or output.shape[:-1] != targets.shape:
        raise ConfigError(
            f"the model's forward returned a tensor {list(output.shape)} for inputs "
            f"{list(batch.inputs.shape)} and targets {list(targets.shape)}; {_LOGITS}"
        )
    if torch.is_grad_enabled() and not output.requires_grad:
        raise ConfigError(
            "the model's output does not depend on any parameter that is trained: forward must not "
            "detach it, nor run under torch.no_grad()"
        )
    _check_range(targets, output.shape[-1], num_outputs)


def _check_range(targets: Tensor, width: int, num_outputs: int | None) -> None:
    """A vocabulary may be padded, so a model of tokens may have more outputs; of classes not."""
    is_classes, most = targets.ndim == 1, width if num_outputs is None else num_outputs
    if width < most or (is_classes and width != most):
        what = "classes" if is_classes else "tokens in its vocabulary"
        raise ConfigError(
            f"the model has {width} outputs for each target, the data has {most} {what}: take "
            "spec.num_outputs, which build(spec) is given"
        )
    learnt = targets[targets != IGNORE_INDEX]
    if learnt.numel() and not (int(learnt.min()) >= 0 and int(learnt.max()) < most):
        raise DataError(
            f"the targets are within {int(learnt.min())} .. {int(learnt.max())}, but the data says "
            f"that there are {most} classes or tokens (Prepared.num_outputs); {_TARGETS}"
        )


_LOGITS = (
    "it must return the logits as one tensor of floats: [batch, classes], or "
    "[batch, length, vocabulary] for tokens"
)
_TARGETS = (
    "smolrun trains classes and next tokens, so a target is an integer 0 .. num_outputs - 1 "
    f"({IGNORE_INDEX}: not learnt)"
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(output: Any) -> str:
    """What it is, and how to get at the logits in it, if that is known."""
    name = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {name} with the keys {', '.join(map(repr, output))}"
    return f"a {name} of {len(output)}" if isinstance(output, list | tuple) else f"a {name}"
