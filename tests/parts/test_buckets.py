"""Buckets fill by themselves, leave in one order, and survive parameters that get no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smolrun.parts.buckets import Bucket, GradientBuckets


class Partial(nn.Module):
    """Three layers, of which a forward pass may leave out the middle one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = x if index == 1 and self.skips else torch.tanh(layer(x))
        return x


def build(
    model: nn.Module, *, slots: int = 1, stages: bool | None = None
) -> tuple[GradientBuckets, list[int]]:
    launched: list[int] = []

    def on_full(bucket: Bucket, slot: int) -> None:
        launched.append(bucket.index)

    return GradientBuckets(
        model.parameters(), bucket_bytes=300, slots=slots, on_full=on_full, stages=stages
    ), launched


def run(model: nn.Module, buckets: GradientBuckets, slot: int, inputs: list[torch.Tensor]) -> None:
    buckets.begin(slot)
    for index, x in enumerate(inputs):
        if index == len(inputs) - 1:
            buckets.arm()
        model(x).sum().backward()
    buckets.finish()


@pytest.mark.parametrize("skips", [False, True])
def test_gradients_are_those_of_plain_backward(skips: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Partial(), [torch.randn(4, 8) for _ in range(3)]
    model.skips = skips
    for x in inputs:
        model(x).sum().backward()
    expected = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()
    ]
    buckets, launched = build(model)
    for _ in range(2):  # the second step must not see the first one's gradients
        run(model, buckets, 0, inputs)
        assert all(
            torch.allclose(p.grad, e)
            for p, e in zip(model.parameters(), expected, strict=True)
            if p.grad is not None
        )
    assert launched == list(range(len(buckets.buckets))) * 2, "every bucket, in order, once a step"


def test_nothing_leaves_before_the_last_micro_batch() -> None:
    model = Partial()
    buckets, launched = build(model)
    buckets.begin(0)
    model(torch.ones(1, 8)).sum().backward()
    assert launched == []
    buckets.finish()
    assert len(launched) == len(buckets.buckets)


def test_full_buckets_leave_during_backward() -> None:
    model = Partial()
    buckets, launched = build(model)
    seen_by_first_layer: list[int] = []
    model.layers[0].register_full_backward_hook(
        lambda *_: seen_by_first_layer.append(len(launched))
    )
    buckets.begin(0)
    buckets.arm()
    model(torch.ones(2, 8)).sum().backward()
    buckets.finish()
    assert seen_by_first_layer[0] > 0, (
        "the last layer's bucket is on its way while the first layer still computes"
    )


def test_slots_do_not_share_memory() -> None:
    model = Partial()
    buckets, _ = build(model, slots=3)
    for slot in range(3):
        run(model, buckets, slot, [torch.full((1, 8), float(slot))])
    sums = [
        sum(bucket.flat[slot].abs().sum().item() for bucket in buckets.buckets) for slot in range(3)
    ]
    assert len(set(sums)) == 3
    buckets.bind(1)
    assert sum(
        p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None
    ) == pytest.approx(sums[1])


def test_a_device_is_staged_through_host_memory() -> None:
    buckets, _ = build(Partial(), stages=True)  # as on an accelerator, whose memory no socket sees
    bucket = buckets.buckets[0]
    bucket.flat[0].fill_(3.0)
    host = bucket.to_host(0)
    assert host is not bucket.flat[0] and bool((host == 3).all())
    host.fill_(5.0)
    assert bool((bucket.from_host(0) == 5).all())


def test_a_bucket_has_one_dtype() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    buckets, _ = build(model)
    assert [len({p.dtype for p in bucket.parameters}) for bucket in buckets.buckets] == [1, 1]
