"""A model whose parameters are sharded among the ranks, except while they are used.

    forward    unshard 0 | compute 0, unshard 1 | reshard 0, compute 1, unshard 2 | ...
    backward   ...    compute 2, unshard 1 | reshard 2, compute 1, unshard 0 | reshard 1, compute 0

A group of parameters is unsharded when one of them is read: by its own layer, by a head that shares
the embedding's weight, or by backward. Autograd would keep every weight alive until backward; it is
given a description of the part that it needs instead, and unshards it again. So only memory and
traffic depend on when a group is resharded. The order of use is recorded, and in the next pass the
groups that follow are unsharded ahead in that order.

All ranks must use the groups in the same order, so each must run the model equally often. An
all_gather carries the group's fingerprint; ranks that use different ones get CollectiveMismatch.

Source: Rajbhandari et al., "ZeRO", 2020 (stage 3); Zhao et al., "PyTorch FSDP", 2023 (prefetch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smolrun.collectives.api import Collectives
from smolrun.mesh.mesh import Work
from smolrun.parts.flat_shards import PendingAllGather, ShardedBucket
from smolrun.parts.norms import layer_of

_HINT = (
    "with algorithm.stage=3 all ranks must use the same layers in the same order; a model whose "
    "layers depend on the sample or on chance needs algorithm=classicdp or algorithm.stage=2"
)


class ParamGroup:
    """Buckets that are unsharded together, each in the dtype that it is used in."""

    def __init__(self, buckets: Sequence[tuple[ShardedBucket, torch.dtype]]) -> None:
        self.buckets = list(buckets)
        self._fingerprints: list[int] = []
        self.pending: list[PendingAllGather] = []
        self.unsharded: list[Tensor] = []
        # The value of resharded parameters: the right shape, no memory, and NaN in every result.
        self._absent = [
            torch.full((), torch.nan, dtype=dtype, device=bucket.device)
            for bucket, dtype in buckets
        ]
        self.reshard()

    @property
    def is_requested(self) -> bool:
        """Whether it is unsharded, or will be."""
        return bool(self.pending or self.unsharded)

    def identify(self, collectives: Collectives, hint: str) -> None:
        """Before the first `unshard`, on all ranks: buckets of equal shape must not be confused."""
        for number, (bucket, _) in enumerate(self.buckets):
            layers = ", ".join(dict.fromkeys(layer_of(name) for name in bucket.names))
            part = f", bucket {number}" if len(self.buckets) > 1 else ""
            what = f"all_gather of layer {layers}{part}"
            self._fingerprints.append(collectives.fingerprint(what, hint))

    def unshard(self, collectives: Collectives) -> None:
        """Starts its all_gathers."""
        for (bucket, dtype), fingerprint in zip(self.buckets, self._fingerprints, strict=True):
            flat = torch.empty(bucket.size, dtype=dtype, device=bucket.device)
            self.pending.append(bucket.gather(collectives, flat, fingerprint))

    def wait_for_unshard(self, wait: Callable[[Work], None]) -> None:
        """Blocks until they are done; parameters become views of the gathered tensors."""
        for (bucket, _), gathering in zip(self.buckets, self.pending, strict=True):
            wait(gathering.work)
            gathering.copy_to_device()
            self.unsharded.append(gathering.flat)
            for parameter, view in zip(
                bucket.parameters, bucket.views(gathering.flat), strict=True
            ):
                parameter.data = view
        self.pending = []

    def reshard(self) -> None:
        """Frees the gathered tensors, also those that are still being gathered."""
        self.pending, self.unsharded = [], []
        for (bucket, _), absent in zip(self.buckets, self._absent, strict=True):
            for parameter, shape in zip(bucket.parameters, bucket.shapes, strict=True):
                parameter.data = absent.expand(shape)


class _UseOrder:
    """The groups that one kind of pass used, in order."""

    def __init__(self) -> None:
        self.known: list[ParamGroup] = []
        self.now: list[ParamGroup] = []

    def begin(self) -> None:
        self.known, self.now = self.now, []

    def after(self, layer: ParamGroup, count: int) -> list[ParamGroup]:
        """Records that a group is used; returns the next ones, if the order is as before."""
        place = len(self.now)
        self.now.append(layer)
        if place >= len(self.known) or self.known[place] is not layer:
            self.known = []
        return self.known[place + 1 : place + 1 + count]


class _SavedView(NamedTuple):
    """What autograd keeps instead of a weight."""

    layer: ParamGroup
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class UnshardOnAccess:
    """Unshards a group of parameters of `model` when one of them is read within a pass."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ParamGroup],
        collectives: Collectives,
        *,
        prefetch: int,
        wait: Callable[[Work], None],
    ) -> None:
        self._layers = layers
        self._layer_of = {
            p: layer for layer in layers for b, _ in layer.buckets for p in b.parameters
        }
        self._collectives = collectives
        self._prefetch = prefetch
        self._wait = wait
        self._orders = {True: _UseOrder(), False: _UseOrder()}
        self._order: _UseOrder | None = None  # None: not within a pass
        self._current: ParamGroup | None = None
        self._memory: dict[int, tuple[ParamGroup, int]] = {}  # by address of the gathered tensor
        for layer in layers:
            layer.identify(collectives, _HINT)
        watch(model, self._use)

    @contextmanager
    def forward_backward_pass(self) -> Iterator[None]:
        """Within, the model may run, forward or forward and backward; values do not change."""
        self._order = self._orders[torch.is_grad_enabled()]
        self._order.begin()
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._order = None

    def reshard(self) -> None:
        """Reshards all groups: their values are about to change, or are not needed soon."""
        self._current = None
        self._memory.clear()
        for layer in self._layers:
            if layer.is_requested:
                layer.reshard()

    def _use(self, parameter: nn.Parameter) -> None:
        layer = self._layer_of.get(parameter)
        if layer is not None and layer is not self._current and self._order is not None:
            self._enter(layer, self._order)

    def _enter(self, layer: ParamGroup, order: _UseOrder) -> None:
        """Unshards a group and starts those that follow; reshards all others."""
        self._current = layer
        wanted = [layer, *order.after(layer, self._prefetch)]
        for other in self._layers:
            if other.is_requested and other not in wanted:
                other.reshard()
        for other in wanted:
            if not other.is_requested:
                other.unshard(self._collectives)
        if layer.pending:
            layer.wait_for_unshard(self._wait)
        self._memory = {
            flat.untyped_storage().data_ptr(): (some, number)
            for some in wanted
            for number, flat in enumerate(some.unsharded)
        }

    def _pack(self, tensor: Tensor) -> Tensor | _SavedView:
        found = self._memory.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        return _SavedView(*found, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, kept: Tensor | _SavedView) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.layer is not self._current:
            assert self._order is not None, "backward runs within the pass"
            self._enter(kept.layer, self._order)
        whole = kept.layer.unsharded[kept.number]
        return whole.as_strided(kept.size, kept.stride, kept.offset)


def watch(model: nn.Module, use: Callable[[nn.Parameter], None]) -> None:
    """From now on `use` is called with every parameter of `model` before it is read."""

    def use_all(module: nn.Module, _: Any) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                use(parameter)

    for module in model.modules():
        if module._parameters:
            module._parameters = _Watched(module._parameters, use)
            # Some modules (LSTM) keep references to their parameters and never read them here.
            module.register_forward_pre_hook(use_all)


class _Watched(dict[str, Any]):
    """A module's own parameters by name; looking one up calls `use`, iterating does not."""

    def __init__(self, parameters: Any, use: Callable[[nn.Parameter], None]) -> None:
        super().__init__(parameters)
        self._use = use

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._use(parameter)
        return parameter


def layers_of(model: nn.Module, least_bytes: int) -> list[list[nn.Parameter]]:
    """The parameters of a model layer by layer; neighbours that are smaller together than
    `least_bytes` are one layer, so that small ones are not waited for one by one."""
    layers: list[list[nn.Parameter]] = []
    last, room = "", 0
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if layer != last:
            size = sum(p.nbytes for n, p in model.named_parameters() if layer_of(n) == layer)
            if size > room:
                layers.append([])
                room = least_bytes
            room -= size
            last = layer
        layers[-1].append(parameter)
    return layers


def used_in_products(model: nn.Module) -> set[nn.Parameter]:
    """Matrices that autocast would turn into half precision; embeddings are looked up instead."""
    looked_up = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    return {parameter for parameter in model.parameters() if parameter.ndim > 1} - looked_up
