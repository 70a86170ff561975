"""Gradients packed into flat buckets, filled by backward itself: `parameter.grad` is a view into a
bucket, nothing is copied.

                 backward goes from the last layer to the first
    slot 0   [ bucket 0: head, block 5 | bucket 1: blocks 4, 3 | bucket 2: blocks 2, 1, 0 ]
    slot 1   [ the same again ]           one slot per step in flight: staleness + 1

A bucket is launched when the last of its gradients is there, so the network works while backward
continues. Buckets are launched in one fixed order on all ranks, also those that never fill because
a parameter got no gradient. Knows nothing of what launching means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

AnyTensor = TypeVar("AnyTensor", bound=torch.Tensor)


@dataclass
class Bucket:
    """Several gradients in one flat tensor, once per slot: `flat[slot]`, (num_elements,), of the
    parameters' dtype and device. `views[slot]` are views of it, one per parameter; `host[slot]` is
    what is sent: the same memory on a CPU, else host memory."""

    index: int
    parameters: list[torch.nn.Parameter]
    flat: list[torch.Tensor] = field(default_factory=list)
    host: list[torch.Tensor] = field(default_factory=list)
    views: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Elements."""
        return sum(parameter.numel() for parameter in self.parameters)

    def to_host(self, slot: int) -> torch.Tensor:
        """The gradients in host memory, ready to be sent."""
        if self.host[slot] is not self.flat[slot]:
            self.host[slot].copy_(self.flat[slot])
        return self.host[slot]

    def from_host(self, slot: int) -> torch.Tensor:
        """The reduced gradients, on the device."""
        if self.host[slot] is not self.flat[slot]:
            self.flat[slot].copy_(self.host[slot])
        return self.flat[slot]


class GradientBuckets:
    """All gradients of a model in buckets of about `bucket_bytes`; owns `parameter.grad`, zeroing
    included.

    on_full(bucket, slot) is called during the last backward of a step, once per bucket, in order.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        bucket_bytes: int,
        slots: int,
        on_full: Callable[[Bucket, int], None],
        stages: bool | None = None,
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.buckets = [
            Bucket(index, packed) for index, packed in enumerate(pack(trained, bucket_bytes))
        ]
        self.slots = slots
        self._on_full = on_full
        self._slot = 0
        self._is_armed = False
        self._launched = 0
        self._missing: list[int] = []
        for bucket in self.buckets:
            _allocate(bucket, slots, stages)
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def begin(self, slot: int) -> None:
        """Starts a step: zeroes the slot and lets backward write into it."""
        self._slot = slot
        self._is_armed = False
        self._launched = 0
        self._missing = [len(bucket.parameters) for bucket in self.buckets]
        for bucket in self.buckets:
            bucket.flat[slot].zero_()
        self.bind(slot)

    def arm(self) -> None:
        """The next backward is the last of this step: full buckets are launched from now on."""
        self._is_armed = True

    def finish(self) -> None:
        """Launches what backward did not fill, in order; call it after the last backward."""
        self._missing = [0] * len(self.buckets)
        self._launch_full()

    def bind(self, slot: int) -> None:
        """Makes every `parameter.grad` the view into a slot."""
        for bucket in self.buckets:
            for parameter, view in zip(bucket.parameters, bucket.views[slot], strict=True):
                parameter.grad = view

    def host_gradients(self, slot: int) -> list[torch.Tensor]:
        """Views of every gradient of a slot in host memory, in the order of the parameters."""
        views = [
            view
            for bucket in self.buckets
            for view in views_of(bucket.host[slot], bucket.parameters)
        ]
        return views[::-1]  # buckets are packed from the last parameter to the first

    def room(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Host memory for one more slot: one flat tensor per bucket, and views of it, one per
        parameter, in the order of the parameters."""
        flat = [torch.empty(b.size, dtype=b.parameters[0].dtype) for b in self.buckets]
        pairs = zip(flat, self.buckets, strict=True)
        return flat, [view for f, b in pairs for view in views_of(f, b.parameters)][::-1]

    def _hook(self, bucket: Bucket) -> Callable[[torch.Tensor], None]:
        def gradient_is_there(_: torch.Tensor) -> None:
            if self._is_armed:
                self._missing[bucket.index] -= 1
                if self._missing[bucket.index] == 0:
                    self._launch_full()

        return gradient_is_there

    def _launch_full(self) -> None:
        while self._launched < len(self.buckets) and self._missing[self._launched] == 0:
            bucket = self.buckets[self._launched]
            self._launched += 1
            self._on_full(bucket, self._slot)


def pack(parameters: Sequence[AnyTensor], bucket_bytes: int) -> list[list[AnyTensor]]:
    """Parameters in reverse order, about the order of their gradients; a bucket has one dtype and
    one device."""
    buckets: list[list[AnyTensor]] = []
    room = 0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.itemsize
        last = buckets[-1][-1] if buckets else None
        fits = (
            last is not None
            and size <= room
            and (last.dtype, last.device) == (parameter.dtype, parameter.device)
        )
        if not fits:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= size
    return buckets


def _allocate(bucket: Bucket, slots: int, stages: bool | None) -> None:
    first = bucket.parameters[0]
    stages = first.device.type != "cpu" if stages is None else stages
    for _ in range(slots):
        flat = torch.zeros(bucket.size, dtype=first.dtype, device=first.device)
        pinned = first.device.type == "cuda"
        bucket.flat.append(flat)
        bucket.host.append(
            torch.empty(bucket.size, dtype=first.dtype, pin_memory=pinned) if stages else flat
        )
        bucket.views.append(views_of(flat, bucket.parameters))


def views_of(flat: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One after the other, each in its parameter's shape."""
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
