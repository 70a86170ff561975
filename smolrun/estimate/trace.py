"""How much memory and work one micro-batch is: the model runs forward and backward once on fake
tensors, which have shapes but no memory, and every storage that is made or let go is counted.

So it is right for any model, recomputed blocks, half precision and the loss included, without
anything being loaded. It sees what torch allocates, not what kernels use inside, nor how an
allocator fills its pages.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from smolrun.errors import SmolrunError
from smolrun.models.base import ModelSpec, StagedModel
from smolrun.models.feed_forward import MixtureOfExperts
from smolrun.models.initialise import meta_device
from smolrun.parts.precision import Precision

# glibc gives a block of this size or more back to the system when it is let go; smaller ones stay
# in the process for the next one of their kind (malloc(3), M_MMAP_THRESHOLD).
LARGE_BYTES = 32 * 1024 * 1024

_aten = torch.ops.aten
# The counter of torch knows the attention kernels of GPUs only.
_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class CannotTrace(SmolrunError):
    """A model that does not run on fake tensors, for example because it looks at values."""


@dataclass(frozen=True)
class Trace:
    """Of one micro-batch, on top of parameters and gradients, in bytes.

    `peak` is the most at one time; `small_peak` and `large_peak` are the same of storages below and
    from LARGE_BYTES, each at its own time. `flops` are those of matrix products, `moved` the bytes
    that all other operations read and write. What of these is the forward's: `forward_flops`,
    `forward_moved`; and `small_kept` and `large_kept`, which it leaves for the backward.
    """

    peak: int
    small_peak: int
    large_peak: int
    flops: int
    moved: int
    small_kept: int = 0
    large_kept: int = 0
    forward_flops: int = 0
    forward_moved: int = 0

    def with_others(self, count: int, received: int) -> Trace:
        """The same beside what so many other micro-batches wait for their backward with, and beside
        `received` bytes of hidden states that come in."""
        small, large = count * self.small_kept, count * self.large_kept
        return replace(
            self,
            peak=self.peak + small + large + received,
            small_peak=self.small_peak + small + received,
            large_peak=self.large_peak + large,
        )


def build_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The model without memory; CannotTrace where its constructor needs values."""
    try:
        with meta_device():
            return make()
    except SmolrunError:
        raise
    except Exception as error:
        raise CannotTrace(f"it cannot be built without values ({error})") from error


def trace(
    model: nn.Module,
    spec: ModelSpec,
    batch_size: int,
    *,
    precision: Precision,
    recompute: bool,
) -> Trace:
    """What one micro-batch of `batch_size` samples needs; `model` comes from `build_on_meta`, may
    be a stage, and is used up. CannotTrace with the reason where that is unknown."""
    counter = _Counter()
    try:
        with _fake(model.to(precision.parameters)):
            if recompute:
                setattr(model, "recompute", True)  # noqa: B010  (nn.Module has no such name)
            _balance(model)
            inputs, targets = _batch(spec, batch_size, precision.parameters)
            counter.pass_over([*_tensors(model), inputs, targets])
            with counter:
                output = _forward(model, _received(model, inputs, precision), precision)
                counter.end_forward()
                _backward(model, output, targets)
    except Exception as error:
        raise CannotTrace(f"it cannot be run without values ({error})") from error
    return counter.trace()


def _balance(model: nn.Module) -> None:
    """Where tokens go is not known without values: experts get equally many, none is dropped."""
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            layer.moe = replace(layer.moe, capacity_factor=None)
            layer.run_experts = functools.partial(_run_evenly, layer)


def _run_evenly(layer: MixtureOfExperts, rows_AD: Tensor, tokens_E: Tensor) -> Tensor:
    parts = rows_AD.tensor_split(len(tokens_E))
    return torch.cat([run(part) for run, part in zip(layer.experts.values(), parts, strict=True)])


def _received(model: nn.Module, tokens: Tensor, precision: Precision) -> Tensor:
    """What the model reads: the batch, or hidden states where it is a later stage."""
    if getattr(model, "has_embedding", True):
        return tokens
    assert isinstance(model, StagedModel), "no other model lacks its embedding"
    shape = (*tokens.shape, model.shape.width)
    return torch.empty(shape, dtype=precision.parameters, requires_grad=True)


def _forward(model: nn.Module, inputs: Tensor, precision: Precision) -> Tensor:
    """Logits, in float32 at least, or the hidden states that a stage sends."""
    with precision.context(torch.device("cpu")):
        output: Tensor = model(inputs)
    if not getattr(model, "has_head", True):
        return output.to(precision.parameters)
    return output if output.dtype == torch.float64 else output.float()


def _backward(model: nn.Module, output: Tensor, targets: Tensor) -> None:
    """As algorithms do it: from the sum of losses, or from the gradient that a stage receives."""
    if not getattr(model, "has_head", True):
        output.backward(torch.empty_like(output))
        return
    cross_entropy(output.flatten(0, -2), targets.flatten(), reduction="sum").backward()


def _batch(spec: ModelSpec, batch_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if spec.sequence_length is None:
        features = torch.empty(batch_size, spec.num_inputs or 1, dtype=dtype)
        return features, torch.empty(batch_size, dtype=torch.int64)
    tokens = torch.empty(batch_size, spec.sequence_length, dtype=torch.int64)
    return tokens, torch.empty_like(tokens)


@contextmanager
def _fake(model: nn.Module) -> Iterator[None]:
    """Within, the tensors of a meta model are fake ones that behave as on a CPU, with gradients."""
    with FakeTensorMode():
        made: dict[int, Tensor] = {}
        for module in model.modules():
            for key, slot in module._parameters.items():
                if slot is not None:
                    if id(slot) not in made:  # a parameter that two modules share stays shared
                        value = nn.Parameter(torch.empty(slot.shape, dtype=slot.dtype))
                        value.requires_grad_(slot.requires_grad)
                        value.grad = torch.empty_like(value) if slot.requires_grad else None
                        made[id(slot)] = value
                    module._parameters[key] = made[id(slot)]  # type: ignore[assignment]
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield


def _tensors(model: nn.Module) -> list[Tensor]:
    """What is there before forward begins."""
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    return [*model.parameters(), *gradients, *model.buffers()]


class _Counter(TorchDispatchMode):
    """Sees every operation, and when the storages that it made are let go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: set[int] = set()
        self._now = [0, 0]  # small, large
        self._peaks = [0, 0]
        self._peak = 0
        self._flops = 0
        self._moved = 0
        self._forward = (0, 0, 0, 0)

    def trace(self) -> Trace:
        small, large = self._peaks
        return Trace(self._peak, small, large, self._flops, self._moved, *self._forward)

    def end_forward(self) -> None:
        """What is alive now is kept for the backward."""
        self._forward = (self._now[0], self._now[1], self._flops, self._moved)

    def pass_over(self, tensors: list[Tensor]) -> None:
        """Do not count these, nor what is written into them."""
        self._alive.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        used = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if count := _FLOPS.get(func._overloadpacket):
            self._flops += count(*args, **kwargs, out_val=out)
        elif not func.is_view:
            self._moved += sum(tensor.nbytes for tensor in (*made, *used))
        for tensor in made:
            self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        kind = int(size >= LARGE_BYTES)
        self._now[kind] += size
        self._peaks[kind] = max(self._peaks[kind], self._now[kind])
        self._peak = max(self._peak, sum(self._now))
        weakref.finalize(storage, functools.partial(self._let_go, key, kind, size))

    def _let_go(self, key: int, kind: int, size: int) -> None:
        self._alive.discard(key)
        self._now[kind] -= size
