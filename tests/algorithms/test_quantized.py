"""Gradients in fewer bits under every algorithm that sends any: replicas stay bit-equal, the loss
stays close, and a step that is skipped leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from smolrun.algorithms.classicdp import ClassicDP
from smolrun.cli.compose import compose
from smolrun.errors import ConfigError
from smolrun.mesh.mesh import Mesh
from smolrun.parts.quantization import Quantization
from smolrun.testing import run_ranks
from tests.algorithms import worlds
from tests.algorithms.test_classicdp import batch, context, poisoned
from tests.algorithms.worlds import Trace, train

INT8 = {"quantization": Quantization("int8", block=32)}
STAGES = [("classicdp", None), ("fsdp", 0), ("fsdp", 1), ("fsdp", 2), ("fsdp", 3)]
EVERY_STAGE = pytest.mark.parametrize(("algorithm", "stage"), STAGES)


def keys(stage: int | None) -> dict[str, Any]:
    """Buckets so small that there are many, and cuts fall into the middle of parameters."""
    small = {"bucket_mb": 0.0005}
    return {"overrides": small if stage is None else {**small, "stage": stage}}


def distance(one: Trace, other: Trace) -> float:
    """Of all parameters together."""
    squares = [
        (one.parameters[name] - other.parameters[name]).square().sum() for name in one.parameters
    ]
    return math.sqrt(float(sum(squares)))


@pytest.mark.parametrize(
    ("kind", "world_size", "staleness"),
    [
        ("int8", 1, 0),
        ("int8", 2, 0),
        ("int8", 3, 2),
        ("int8", 4, 0),
        ("fp16", 3, 0),
        ("bf16", 3, 1),
    ],
)
def test_replicas_are_bit_equal_and_the_loss_is_close(
    kind: str, world_size: int, staleness: int
) -> None:
    plain = train("classicdp", "language_model", world_size, staleness=staleness)
    traces = train(
        "classicdp",
        "language_model",
        world_size,
        staleness=staleness,
        precision="float32",
        more={"quantization": Quantization(kind)},
    )
    for trace in traces:
        assert trace.hashes == traces[0].hashes and len(set(trace.hashes)) > 5
        assert trace.losses == pytest.approx(plain[0].losses, rel=2e-3)
    assert world_size == 1 or distance(traces[0], plain[0]) > 1e-6, "rounding is there"


@EVERY_STAGE
def test_every_stage_learns_the_same(algorithm: str, stage: int | None) -> None:
    staleness = 2 if stage in (1, 2) else 0
    plain = train("single", "language_model", 1, staleness=staleness)[0]
    more = {**keys(stage), "staleness": staleness}
    for trace in train(algorithm, "language_model", 3, more=INT8, **more):
        assert trace.losses == pytest.approx(plain.losses, rel=2e-3)
        assert 1e-6 < distance(trace, plain) < 0.05


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("algorithm", worlds.ALGORITHMS)
def test_whatever_is_not_refused_works(algorithm: str, staleness: int) -> None:
    """A new yaml is tried the day it is written."""
    if why := refusal(algorithm, staleness):
        pytest.skip(why)
    plain = train(algorithm, "mlp", 2, staleness=staleness)[0]
    for trace in train(algorithm, "mlp", 2, more=INT8, staleness=staleness):
        assert trace.losses == pytest.approx(plain.losses, rel=5e-3)


def refusal(algorithm: str, staleness: int) -> str:
    """Why the configuration refuses int8 there; empty where it does not."""
    try:
        compose([f"algorithm={algorithm}", f"staleness.bound={staleness}", "quantization=int8"])
    except ConfigError as error:
        return str(error)
    return ""


@EVERY_STAGE
def test_kind_none_changes_nothing(algorithm: str, stage: int | None) -> None:
    plain = train("single", "language_model", 1)[0]
    none = {"quantization": Quantization("none")}
    for trace in train(algorithm, "language_model", 3, more=none, **keys(stage)):
        assert distance(trace, plain) <= 1e-12


@pytest.mark.parametrize("stage", [0, 2])
def test_float16_and_its_loss_scale(stage: int) -> None:
    """Gradients are unscaled before they are rounded."""
    more = {**keys(stage), "precision": "fp16", "optimizer": "adamw"}
    scale = {"expected_weight": 1 << 14}
    plain = train("fsdp", "language_model", 2, more=scale, **more)[0]
    for trace in train("fsdp", "language_model", 2, more={**scale, **INT8}, **more):
        assert trace.losses == pytest.approx(plain.losses, rel=5e-3)


def test_feedback_brings_a_coarse_quantizer_closer() -> None:
    """One scale for far too many numbers; momentum sums the same errors up again and again."""
    plain = train("single", "language_model", 1, steps=30)[0]
    far = {}
    for feedback in (True, False):
        quantization = Quantization("int8", block=4096, error_feedback=feedback)
        traces = train("classicdp", "language_model", 2, steps=30, more={
            "quantization": quantization})  # fmt: skip
        far[feedback] = distance(traces[0], plain)
    assert far[True] < 0.7 * far[False]


@EVERY_STAGE
def test_a_nan_in_one_rank_is_skipped_by_all(
    algorithm: str, stage: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worlds.sample

    def bad(model: str, step: int) -> worlds.Batch:
        batch = whole(model, step)
        if step == 4:
            batch.inputs[-1] = math.nan  # a sample of the last rank
        return batch

    monkeypatch.setattr(worlds, "sample", bad)
    for trace in train(algorithm, "mlp", 3, more=INT8, **keys(stage)):
        assert [r.step for r in trace.results if r.grad_norm is None] == [4]
        assert trace.results[4].nonfinite_ranks == (2,)
        assert all(torch.isfinite(tensor).all() for tensor in trace.parameters.values())


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_skipped_step_does_not_touch_residuals(staleness: int) -> None:
    """As if it had never been: in step 2 one rank's gradient is not a number."""

    def rank_main(mesh: Mesh) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        made = context(mesh, staleness=staleness)
        object.__setattr__(made, "quantization", Quantization("int8"))
        algorithm = ClassicDP(made, bucket_mb=0.01)
        torch.manual_seed(0)
        algorithm.place(torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(64, 8)))
        slot = algorithm.slot(2)

        def residuals() -> list[torch.Tensor]:
            kept = [f for (_, of), f in sorted(algorithm.reducer._feedback.items()) if of == slot]
            return [feedback.residual.clone() for feedback in kept]

        for step in range(2 + staleness):
            algorithm.train_step([batch(mesh.rank, step)])
        algorithm.drain()
        before = residuals()
        algorithm.steps_begun += (2 - algorithm.steps_begun) % (staleness + 1)
        if mesh.rank == 1:
            poisoned(algorithm.model)
        algorithm.train_step([batch(mesh.rank, 9)])
        algorithm.drain()
        return before, residuals()

    for before, after in run_ranks(3, rank_main):
        assert staleness or any(residual.any() for residual in before)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
        assert all(torch.isfinite(residual).all() for residual in after)


def test_int8_training_sends_a_quarter() -> None:
    def rank_main(mesh: Mesh) -> list[int]:
        counts = []
        for kind in ("none", "int8"):
            made = context(mesh)
            object.__setattr__(made, "quantization", Quantization(kind))
            algorithm = ClassicDP(made, bucket_mb=1.0)
            algorithm.place(torch.nn.Sequential(torch.nn.Linear(16, 40_000), torch.nn.ReLU(),
                                                torch.nn.Linear(40_000, 8)))  # fmt: skip
            algorithm.collectives.barrier()
            before = mesh.bytes_sent
            for step in range(3):
                algorithm.train_step([batch(mesh.rank, step)])
            counts.append(mesh.bytes_sent - before)
            algorithm.collectives.barrier()
        return counts

    for plain, quantized in run_ranks(3, rank_main, kind="tcp"):
        assert 0.25 * plain < quantized <= 0.255 * plain
