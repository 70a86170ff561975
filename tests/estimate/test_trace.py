"""Fake tensors tell what real ones would need: counted by hand where that is possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smolrun.estimate import trace as tracing
from smolrun.estimate.stages import StageKind, build_stage
from smolrun.estimate.trace import CannotTrace, Trace, build_on_meta, trace
from smolrun.models.decoder import build
from smolrun.models.mlp import MLP
from smolrun.parts.precision import PRECISIONS
from tests.models.tiny import MOE, TINY

FLOAT32 = PRECISIONS["float32"]


@dataclass(frozen=True)
class Spec:
    num_outputs: int
    num_inputs: int | None = None
    sequence_length: int | None = None
    model_folder: str | None = None


def of_mlp(batch: int) -> Trace:
    model = build_on_meta(lambda: MLP(1000, 10, [2000], "relu"))
    spec = Spec(10, num_inputs=1000)
    return trace(model, spec, batch, precision=FLOAT32, recompute=False)


def of_decoder(
    batch: int = 4, *, precision: str = "float32", recompute: bool = False, **keys: Any
) -> Trace:
    spec = Spec(50, sequence_length=40)
    model = build_on_meta(lambda: build(spec, **{**TINY, "layers": 8, **keys}))
    return trace(model, spec, batch, precision=PRECISIONS[precision], recompute=recompute)


def test_an_mlp_by_hand() -> None:
    batch, numbers = 64, 4
    work = of_mlp(batch)
    # Two products forward; backward both with respect to weights, one with respect to its input.
    assert work.flops == 2 * batch * (1000 * 2000 + 2000 * 10) * 2 + 2 * batch * 2000 * 10
    hidden = batch * 2000 * numbers
    # Backward ends with the gradient of the first weights beside that of the hidden layer.
    largest_gradient = 1000 * 2000 * numbers
    assert hidden + largest_gradient <= work.peak <= 3 * hidden + largest_gradient
    assert (work.small_peak, work.large_peak) == (work.peak, 0)


def test_activations_grow_with_the_batch_alone() -> None:
    one, two, three = (of_decoder(batch) for batch in (8, 16, 24))
    assert two.peak - one.peak == pytest.approx(three.peak - two.peak, rel=0.02)
    assert two.flops == 2 * one.flops


def test_a_token_is_computed_by_its_experts_only() -> None:
    wide = of_decoder(ffn_width=64)
    chosen = {"experts": 8, "experts_per_token": 2, "capacity_factor": 1.25}
    both = of_decoder(ffn_width=32, moe={**MOE, **chosen})
    router = 3 * 2 * 4 * 40 * 32 * 8 * 8
    assert both.flops == pytest.approx(wide.flops + router, rel=1e-3)
    assert of_decoder(ffn_width=32, moe={**MOE, **chosen}, recompute=True).peak < both.peak


def of_stage(kind: StageKind, batch: int = 4) -> Trace:
    spec = Spec(50, sequence_length=40)
    model = build_stage(lambda: build(spec, **{**TINY, "layers": 8}), kind)
    return trace(model, spec, batch, precision=FLOAT32, recompute=False)


def test_stages_do_the_work_of_the_whole() -> None:
    whole = of_decoder()
    stages = [StageKind(3, True, False), StageKind(4, False, False), StageKind(1, False, True)]
    works = [of_stage(kind) for kind in stages]
    # The first layer of a stage has to pass a gradient on; the embedding has none to pass.
    assert sum(work.flops for work in works) == whole.flops
    assert sum(work.forward_flops for work in works) == whole.forward_flops
    assert 3 * whole.forward_flops == pytest.approx(whole.flops, rel=0.05)


def test_what_waits_for_its_backward_grows_with_layers_and_batch() -> None:
    one, two = (of_stage(StageKind(count, False, False)) for count in (1, 2))
    hidden = 4 * 40 * TINY["width"] * 4
    # The states that came in, and those that go out.
    layer = two.small_kept - one.small_kept
    assert layer == pytest.approx(one.small_kept - hidden, rel=0.01)
    assert of_stage(StageKind(2, False, False), 8).small_kept == pytest.approx(
        2 * two.small_kept, rel=0.01
    )
    assert two.small_kept < two.small_peak == two.peak
    three = two.with_others(2, received=100)
    assert three.peak - two.peak == three.small_peak - two.small_peak == 2 * two.small_kept + 100
    assert three.large_peak == 0


def test_recomputed_blocks_need_less_memory_and_more_work() -> None:
    plain, recomputed = of_decoder(), of_decoder(recompute=True)
    assert recomputed.peak < 0.5 * plain.peak
    assert 1.2 * plain.flops < recomputed.flops < 4 / 3 * plain.flops


def test_half_precision_needs_less() -> None:
    full, half, weights = (of_decoder(precision=p) for p in ("float32", "bf16", "bf16_params"))
    assert weights.peak < half.peak < full.peak


def test_storages_are_told_apart_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = of_mlp(64)
    monkeypatch.setattr(tracing, "LARGE_BYTES", 64 * 2000 * 4 + 1)
    work = of_mlp(64)
    assert work.large_peak == 1000 * 2000 * 4  # the new gradient of the first weights
    assert work.peak == whole.peak
    assert work.small_peak <= work.peak <= work.small_peak + work.large_peak


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs)
        return output * 2 if output.sum().item() > 0 else output


class NeedsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size = int(torch.ones(()).item())


def test_a_model_that_looks_at_values_is_told_as_such() -> None:
    model = build_on_meta(LooksAtValues)
    with pytest.raises(CannotTrace, match="cannot be run without values"):
        trace(model, Spec(2, num_inputs=3), 4, precision=FLOAT32, recompute=False)
    with pytest.raises(CannotTrace, match="cannot be built without values"):
        build_on_meta(NeedsValues)
