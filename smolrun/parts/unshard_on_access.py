"""A model whose parameters are whole only while they are used.

    forward    gather layer 0 | compute 0, gather 1 | free 0, compute 1, gather 2 | ...
    backward   ...    compute 2, gather 1 | free 2, compute 1, gather 0 | free 1, compute 0

A layer is gathered when somebody looks at one of its parameters, whoever that is: the layer itself,
a head that shares the embedding's weight, or backward. Backward would keep every weight alive; what
it is given to keep is a note which part of which bucket it needs, and it gets that part gathered
anew. So nothing depends on when a layer is freed but memory and traffic. The order in which layers
were used is remembered, and the next time the layers to come are fetched ahead in that order.

All ranks must use layers in the same order, so each must run the model equally often. A gather
carries the layer's fingerprint, so ranks that use different ones get CollectiveMismatch.

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
    """Buckets that are whole together, each in the format that it is used in."""

    def __init__(self, buckets: Sequence[tuple[ShardedBucket, torch.dtype]]) -> None:
        self.buckets = list(buckets)
        self._fingerprints: list[int] = []
        self.pending: list[PendingAllGather] = []
        self.unsharded: list[Tensor] = []
        # Seen where there is nothing: right in shape, no memory, and loudly wrong.
        self._absent = [
            torch.full((), torch.nan, dtype=dtype, device=bucket.device)
            for bucket, dtype in buckets
        ]
        self.reshard()

    @property
    def is_requested(self) -> bool:
        """Whether it is whole, or on its way."""
        return bool(self.pending or self.unsharded)

    def identify(self, collectives: Collectives, hint: str) -> None:
        """Before the first `unshard`, on all ranks: buckets of equal shape must not be confused."""
        for number, (bucket, _) in enumerate(self.buckets):
            layers = ", ".join(dict.fromkeys(layer_of(name) for name in bucket.names))
            part = f", bucket {number}" if len(self.buckets) > 1 else ""
            what = f"all_gather of layer {layers}{part}"
            self._fingerprints.append(collectives.fingerprint(what, hint))

    def unshard(self, collectives: Collectives) -> None:
        """Starts to gather it."""
        for (bucket, dtype), fingerprint in zip(self.buckets, self._fingerprints, strict=True):
            flat = torch.empty(bucket.size, dtype=dtype, device=bucket.device)
            self.pending.append(bucket.gather(collectives, flat, fingerprint))

    def wait_for_unshard(self, wait: Callable[[Work], None]) -> None:
        """Waits until it is whole, and puts its parameters in place."""
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
        """Lets go of it, also of what is still on its way."""
        self.pending, self.unsharded = [], []
        for (bucket, _), absent in zip(self.buckets, self._absent, strict=True):
            for parameter, shape in zip(bucket.parameters, bucket.shapes, strict=True):
                parameter.data = absent.expand(shape)


class _Order:
    """The layers that one kind of pass used, one after the other."""

    def __init__(self) -> None:
        self.known: list[ParamGroup] = []
        self.now: list[ParamGroup] = []

    def begin(self) -> None:
        self.known, self.now = self.now, []

    def after(self, layer: ParamGroup, count: int) -> list[ParamGroup]:
        """Notes that a layer is used; the next ones, if this goes as it went before."""
        place = len(self.now)
        self.now.append(layer)
        if place >= len(self.known) or self.known[place] is not layer:
            self.known = []
        return self.known[place + 1 : place + 1 + count]


class _Part(NamedTuple):
    """What backward keeps instead of a weight."""

    layer: ParamGroup
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class UnshardOnAccess:
    """Watches every parameter of `model` that lies in one of `layers`."""

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
        self._orders = {True: _Order(), False: _Order()}
        self._order: _Order | None = None  # None: nobody may look at values now
        self._current: ParamGroup | None = None
        self._memory: dict[
            int, tuple[ParamGroup, int]
        ] = {}  # address of a whole bucket -> what it is
        for layer in layers:
            layer.identify(collectives, _HINT)
        watch(model, self._use)

    @contextmanager
    def forward_backward_pass(self) -> Iterator[None]:
        """Within, a model may run, forward or forward and backward; the values do not change."""
        self._order = self._orders[torch.is_grad_enabled()]
        self._order.begin()
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._order = None

    def reshard(self) -> None:
        """Lets go of all layers: the values change now, or nobody needs them for a while."""
        self._current = None
        self._memory.clear()
        for layer in self._layers:
            if layer.is_requested:
                layer.reshard()

    def _use(self, parameter: nn.Parameter) -> None:
        layer = self._layer_of.get(parameter)
        if layer is not None and layer is not self._current and self._order is not None:
            self._enter(layer, self._order)

    def _enter(self, layer: ParamGroup, order: _Order) -> None:
        """Makes a layer whole, fetches those to come, and frees all others."""
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

    def _pack(self, tensor: Tensor) -> Tensor | _Part:
        found = self._memory.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        return _Part(*found, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, kept: Tensor | _Part) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.layer is not self._current:
            assert self._order is not None, "backward belongs into the pass"
            self._enter(kept.layer, self._order)
        whole = kept.layer.unsharded[kept.number]
        return whole.as_strided(kept.size, kept.stride, kept.offset)


def watch(model: nn.Module, use: Callable[[nn.Parameter], None]) -> None:
    """From now on `use` is told of every parameter that somebody looks at, before he sees it."""

    def use_all(module: nn.Module, _: Any) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                use(parameter)

    for module in model.modules():
        if module._parameters:
            module._parameters = _Watched(module._parameters, use)
            # Some modules (LSTM) remember their parameters and never look here again.
            module.register_forward_pre_hook(use_all)


class _Watched(dict[str, Any]):
    """A module's own parameters by name; looking one up tells so. Walking over all does not."""

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
    owners = [m for m in model.modules() if not isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    looked_up = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    own = {p for module in owners for p in module.parameters(recurse=False) if p.ndim > 1}
    return own - looked_up
