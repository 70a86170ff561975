"""What is on its way is waited for by whoever looks at it, and not before; seen in whole steps of
fsdp and classicdp whose gathers never finish unless somebody waits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from smolrun.algorithms.optimizer_shards import OptimizerShards
from smolrun.collectives.api import Collectives
from smolrun.parts.flat_shards import PendingAllGather, ShardedBucket
from tests.algorithms import worlds
from tests.algorithms.worlds import Trace, train

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("fsdp", {"stage": 1, "bucket_mb": 0.001}),
    ("fsdp", {"stage": 2, "bucket_mb": 0.001}),
    ("classicdp", {"bucket_mb": 0.001, "shard_optimizer": True}),
]


@dataclasses.dataclass
class Slow:
    """A gather that is finished by waiting for it, never by itself."""

    work: Any
    scratch: torch.Tensor
    flat: torch.Tensor

    def wait(self, timeout_s: float | None = None) -> None:
        self.work.wait()
        self.flat.copy_(self.scratch)


@pytest.fixture(autouse=True)
def slow_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ShardedBucket.gather

    def gather(
        self: ShardedBucket, collectives: Collectives, flat: torch.Tensor
    ) -> PendingAllGather:
        scratch = flat.clone()
        gathering = right(self, collectives, scratch)
        return PendingAllGather(Slow(gathering.work, scratch, flat), flat, flat)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardedBucket, "gather", gather)


def difference(traces: list[Trace], reference: Trace) -> float:
    return max(
        abs(one - other)
        for trace in traces
        for one, other in zip(trace.losses, reference.losses, strict=True)
    )


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("algorithm", "keys"), FORMS)
def test_everybody_waits_for_what_he_uses(
    algorithm: str, keys: dict[str, Any], staleness: int
) -> None:
    more: dict[str, Any] = {"staleness": staleness, "steps": 4}
    reference = train("single", "language_model", 1, **more)[0]
    traces = train(algorithm, "language_model", 3, overrides=keys, **more)
    assert difference(traces, reference) < 1e-12
    for trace in traces:
        assert trace.hashes == traces[0].hashes
        assert trace.eval is not None and reference.eval is not None
        assert trace.eval.loss == pytest.approx(reference.eval.loss, abs=1e-10)


@pytest.mark.parametrize(("algorithm", "keys"), FORMS)
def test_who_does_not_wait_sees_old_values(
    algorithm: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    monkeypatch.setattr(OptimizerShards, "_use", lambda self, parameter: None)
    monkeypatch.setattr(worlds, "parameter_hash", lambda tensors: "")
    monkeypatch.setattr("smolrun.algorithms.fsdp.OptimizerShards.replica_tensors", lambda self: {})
    reference = train("single", "language_model", 1, steps=4)[0]
    traces = train(algorithm, "language_model", 3, steps=4, overrides=keys)
    assert difference(traces, reference) > 1e-6


def test_forward_begins_while_the_last_layers_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    right = OptimizerShards._use

    def use(self: OptimizerShards, parameter: Any) -> None:
        right(self, parameter)
        seen.append(len(self._gathers))

    monkeypatch.setattr(OptimizerShards, "_use", use)
    monkeypatch.setattr("smolrun.algorithms.fsdp.OptimizerShards.replica_tensors", lambda self: {})
    train("fsdp", "mlp", 2, steps=2, overrides={"stage": 1, "bucket_mb": 0.0001})
    assert max(seen) >= 2, "after the first layer was waited for, others were still on their way"
