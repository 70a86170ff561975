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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from smolrun.errors import SmolrunError
from smolrun.models.base import ModelSpec
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
    that all other operations read and write.
    """

    peak: int
    small_peak: int
    large_peak: int
    flops: int
    moved: int


def build_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The model without memory; CannotTrace where its constructor needs values."""
    try:
        with torch.device("meta"):
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
    """What one micro-batch of `batch_size` samples needs; `model` comes from `build_on_meta` and is
    used up. CannotTrace with the reason where that is unknown."""
    counter = _Counter()
    try:
        with _fake(model.to(precision.parameters)):
            if recompute:
                setattr(model, "recompute", True)  # noqa: B010  (nn.Module has no such name)
            inputs, targets = _batch(spec, batch_size, precision.parameters)
            counter.pass_over([*_tensors(model), inputs, targets])
            with counter:
                _forward_backward(model, inputs, targets, precision)
    except Exception as error:
        raise CannotTrace(f"it cannot be run without values ({error})") from error
    return counter.trace()


def _forward_backward(
    model: nn.Module, inputs: Tensor, targets: Tensor, precision: Precision
) -> None:
    """As algorithms do it: the loss in float32 and as a sum."""
    with precision.context(torch.device("cpu")):
        logits = model(inputs)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    loss.backward()


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

    def trace(self) -> Trace:
        small, large = self._peaks
        return Trace(self._peak, small, large, self._flops, self._moved)

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
