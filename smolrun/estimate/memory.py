"""What a rank needs to remember, and what would make it need less: arithmetic, before anything is
loaded.

    process       Python, torch and the libraries, before there is a model
    parameters    4 bytes each in float32, 2 with precision=bf16_params
    gradients     as many again; with staleness K so many K + 1 times
    optimizer     adamw 8 bytes (bf16_params: 4), lion and sgd 4 (2), adafactor next to nothing
    activations   what forward keeps for backward, and the logits: see trace.py
    residuals     what quantization took away: 8 bytes, with staleness K so many K + 1 times
    passing       fsdp: buckets of gradients on their way, layers that are whole just now
    pushes        syncps: the server's room for gradients of workers; average: of the weights
    update        what the update needs beyond the room that activations have left
    staging       host copies of the gradients, where a device computes
    checkpoint    this rank's share of a copy, while it is written
    slack         what the allocator cannot use

Knows nothing of hosts, files and configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from smolrun.config.sharding import NOT_CUT, Sharding
from smolrun.estimate.trace import Trace
from smolrun.parts.optimizer_state import state_shapes
from smolrun.parts.quantization import NO_QUANTIZATION, Quantization
from smolrun.training.stochastic_rounding import PIECE

# glibc keeps blocks of many sizes apart: over runs of gpt_tiny and gpt_small the process held a
# fifth more than the small blocks alive in it (tests/tasks/test_dry_run_measured.py).
_SLACK = 0.2
# The same runs held 20 to 60 MB that nothing here explains: workspaces of kernels, mapped data.
_UNEXPLAINED = 32 * 1024 * 1024
_STATE_BYTES = {"float32": 4, "bf16": 4, "fp16": 4, "float64": 8, "bf16_params": 2}
_HEAVINESS = {"adamw": 2, "lion": 1, "sgd": 1, "adafactor": 0}  # state per parameter
_MANY = 1 << 20  # numbers, to see what one of them travels in
_LION_AT_ONCE = 4 * 1024 * 1024  # as in optimizer.py


@dataclass(frozen=True)
class Setting:
    """The switches that memory depends on, beside the model."""

    precision: str
    recompute: bool
    micro_batch_size: int
    optimizer: str


@dataclass(frozen=True)
class Rank:
    """What does not change with the switches. `shapes` are those of all trained parameters."""

    shapes: tuple[tuple[int, ...], ...]
    frozen: int  # numbers in frozen parameters and buffers
    world_size: int
    process_bytes: int
    slots: int = 1  # gradients in memory: staleness + 1
    is_on_device: bool = False  # on a GPU, whose allocator lets free blocks serve any size
    is_staged: bool = False
    has_momentum: bool = True
    copies_for_norms: bool = False
    saves: bool = False
    is_stage: bool = False  # it holds a stage of layers, or experts, and saves all of that
    weight_copies: int = 0  # of other steps
    experts: int = 0  # numbers in experts that it alone has, whose gradients stay
    token_bytes: int = 0  # of tokens that go to experts of other ranks in a step, and back
    sharding: Sharding = NOT_CUT
    quantization: Quantization = NO_QUANTIZATION

    @property
    def residuals(self) -> int:
        """Numbers that rounding took away, of this rank; in memory they are there twice."""
        has_any = not self.quantization.is_none and self.quantization.error_feedback
        return self.slots * self.trained if has_any else 0

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def largest(self) -> int:
        """Numbers in the largest of them."""
        return max((math.prod(shape) for shape in self.shapes), default=0)


@dataclass(frozen=True)
class Need:
    """Bytes of one rank at its worst moment, part by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def item_bytes(precision: str) -> int:
    """Bytes of one parameter, of its gradient, and of a number that the optimizer remembers."""
    return _STATE_BYTES[precision]


def optimizer_bytes(rank: Rank, setting: Setting) -> int:
    """What the optimizer remembers between two updates."""
    is_rounded = setting.precision == "bf16_params"
    size = item_bytes(setting.precision)
    total = 0
    for shape in rank.shapes:
        states = state_shapes(
            setting.optimizer, shape, has_momentum=rank.has_momentum, is_rounded=is_rounded
        )
        for state in states.values():
            # What is not as large as the parameter stays in float32.
            total += math.prod(state) * (size if state == tuple(shape) else max(4, size))
    return total


def update_bytes(rank: Rank, setting: Setting) -> int:
    """Temporary tensors of an update."""
    size, largest = item_bytes(setting.precision), rank.largest
    if setting.precision == "bf16_params":
        # Four tensors of 32-bit numbers: the copy, its gradient, the direction, the random bits.
        at_once = largest if setting.optimizer == "adafactor" else 3 * min(PIECE, largest)
        needed = 4 * 4 * at_once
    else:
        needed = {
            "adamw": 0,
            "sgd": 2 * size * largest,
            "lion": size * min(max(_LION_AT_ONCE, largest), rank.trained),
            "adafactor": size * largest,
        }[setting.optimizer]
    return needed + (size * rank.trained if rank.copies_for_norms else 0)


def checkpoint_bytes(rank: Rank, setting: Setting) -> int:
    """A whole checkpoint: parameters, optimizer, gradients in flight, residuals of all ranks."""
    size = item_bytes(setting.precision)
    weights = size * (rank.trained + rank.frozen)
    more = size * rank.trained * (rank.slots - 1 + rank.sharding.averages)
    more += rank.world_size * rank.residuals * max(4, size)
    return weights + optimizer_bytes(rank, setting) + more


def need(rank: Rank, setting: Setting, work: Trace | None) -> Need:
    """What a rank needs; without a trace, activations count as nothing."""
    size = item_bytes(setting.precision)
    gradients = size * rank.trained
    small, large = (work.small_peak, work.large_peak) if work else (0, 0)
    # Small blocks that are free do not go back to the system, so on a CPU both peaks count.
    apart = 0 if rank.is_on_device else small + large
    activations = max(work.peak, apart) if work else 0
    cut = rank.sharding
    has_share = cut.stage or cut.links or rank.is_stage
    share = cut.share if has_share else 1 / rank.world_size
    parts = {
        "process": rank.process_bytes,
        "parameters": int(
            size * (rank.trained + rank.frozen) * cut.of(3) * (1 + rank.weight_copies)
        ),
        "gradients": int(gradients * cut.of(2)),
        "late gradients": int(gradients * (rank.slots - 1) * cut.of(2)),
        "residuals": 2 * rank.residuals * max(4, size),
        "passing": cut.passing(size, _used_bytes(setting)),
        "pushes": gradients * rank.slots * cut.push_buffers,
        "average": gradients * cut.averages,
        "staging": gradients * rank.slots if rank.is_staged and cut.stage < 2 else 0,
        "optimizer": int(optimizer_bytes(rank, setting) * cut.of(1)),
        "activations": activations,
        "update": max(0, int(update_bytes(rank, setting) * cut.of(1)) - large),
        "checkpoint": int(checkpoint_bytes(rank, setting) * share) if rank.saves else 0,
        "slack": int(_SLACK * small) + _UNEXPLAINED,
    }
    return Need(parts)


def sent_bytes(rank: Rank, setting: Setting, micro_batches: int) -> int:
    """What a rank sends, and receives, in one step; less with frozen layers before all that is
    trained, as backward does not gather those again."""
    size, used = item_bytes(setting.precision), _used_bytes(setting)
    in_wires = rank.quantization.quantizer().wire_bytes
    gradient = size if rank.quantization.is_none else in_wires(_MANY) / _MANY
    if links := rank.sharding.links:  # a server sends weights, a worker gradients
        return int(links * rank.trained * (size if rank.sharding.push_buffers else gradient))
    cut = rank.sharding
    moved = (rank.trained - rank.experts) * cut.moved(size, used, gradient, micro_batches)
    moved += rank.frozen * cut.gathered(used, micro_batches)
    return int((rank.world_size - 1) / rank.world_size * moved) + rank.token_bytes


def _used_bytes(setting: Setting) -> int:
    """Bytes of a parameter in the format that products are computed in."""
    return 2 if setting.precision in ("bf16", "fp16") else item_bytes(setting.precision)


# -- what would make it fit --


@dataclass(frozen=True)
class Remedy:
    """Keys to give on the command line, and what a rank needs then."""

    keys: tuple[str, ...]
    setting: Setting
    total: int


def switches(current: Setting, *, can_recompute: bool, is_cut: bool = False) -> dict[str, Setting]:
    """Every single key that can save memory, as it would be typed, with the setting it gives. Those
    that leave the results as they are come first. `is_cut`: ranks hold parts of matrices only."""
    found: dict[str, Setting] = {}
    if can_recompute and not current.recompute:
        found["training.recompute=true"] = replace(current, recompute=True)
    if current.micro_batch_size > 1:
        found["training.micro_batch_size=1"] = replace(current, micro_batch_size=1)
    for name in ("lion", "adafactor", "sgd"):
        needs_whole = name == "adafactor"
        if _HEAVINESS[name] < _HEAVINESS[current.optimizer] and not (needs_whole and is_cut):
            found[f"optimizer={name}"] = replace(current, optimizer=name)
    if current.precision != "bf16_params":
        found["precision=bf16_params"] = replace(current, precision="bf16_params")
    return found


def best_switches(
    current: Setting,
    total: Callable[[Setting], int],
    *,
    can_recompute: bool,
    is_cut: bool = False,
    count: int = 2,
) -> list[Remedy]:
    """The single keys that save most, at most one per group, largest saving first."""
    now = total(current)
    remedies = [
        Remedy((key,), setting, total(setting))
        for key, setting in switches(current, can_recompute=can_recompute, is_cut=is_cut).items()
    ]
    remedies.sort(key=lambda remedy: remedy.total)
    chosen: list[Remedy] = []
    for remedy in remedies:
        groups = {other.keys[0].split("=")[0] for other in chosen}
        if remedy.total < now and remedy.keys[0].split("=")[0] not in groups:
            chosen.append(remedy)
    return chosen[:count]


def smallest_change(
    current: Setting,
    total: Callable[[Setting], int],
    limit: int,
    *,
    can_recompute: bool,
    is_cut: bool = False,
) -> Remedy | None:
    """The keys that make a rank fit into `limit` bytes: as few as possible, and first of all those
    that leave the results as they are. None if all together are not enough."""
    found = switches(current, can_recompute=can_recompute, is_cut=is_cut)
    for keys in _by_harm(list(found)):
        setting = _with(current, keys)
        if (needed := total(setting)) <= limit:
            return Remedy(keys, setting, needed)
    return None


def _by_harm(keys: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations with one key per group, the harmless and short ones first."""
    sets = [
        chosen
        for size in range(1, len(keys) + 1)
        for chosen in combinations(keys, size)
        if len({key.split("=")[0] for key in chosen}) == size
    ]

    def harm(chosen: Sequence[str]) -> tuple[int, int]:
        """How many of the keys change what is computed, and how many there are."""
        return sum(not key.startswith("training.") for key in chosen), len(chosen)

    return sorted(sets, key=harm)


def _with(setting: Setting, keys: Sequence[str]) -> Setting:
    for key in keys:
        name, _, value = key.rpartition("=")
        if name == "training.recompute":
            setting = replace(setting, recompute=True)
        elif name == "training.micro_batch_size":
            setting = replace(setting, micro_batch_size=int(value))
        elif name == "optimizer":
            setting = replace(setting, optimizer=value)
        else:
            setting = replace(setting, precision=value)
    return setting


def fitting_micro_batch(
    remedy: Remedy, largest: int, total: Callable[[Setting], int], limit: int
) -> Remedy:
    """The same remedy with the largest micro-batch, in powers of two, that still fits."""
    key = "training.micro_batch_size=1"
    while key in remedy.keys:
        twice = 2 * remedy.setting.micro_batch_size
        setting = replace(remedy.setting, micro_batch_size=twice)
        if twice >= largest or (needed := total(setting)) > limit:
            break
        remedy = Remedy(remedy.keys, setting, needed)
    size = remedy.setting.micro_batch_size
    keys = tuple(f"training.micro_batch_size={size}" if k == key else k for k in remedy.keys)
    return replace(remedy, keys=keys)
