"""A model with experts under every algorithm: routers learn, their losses add up whoever computes
them, and all tokens are counted."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from smolrun.algorithms.experts import expert_tokens
from smolrun.data.splits import IGNORE_INDEX
from smolrun.models.decoder import Decoder
from tests.algorithms.test_equivalence import difference
from tests.algorithms.worlds import DECODERS, Trace, experts, sample, train


@functools.cache
def one_rank(model: str = "experts", staleness: int = 0) -> Trace:
    return train("single", model, 1, steps=5, staleness=staleness)[0]


def tokens_of(trace: Trace) -> list[tuple[list[list[int]], int] | None]:
    return [expert_tokens(result.stats) for result in trace.results]


def test_single_adds_the_losses_of_its_routers_by_targets() -> None:
    torch.manual_seed(0)
    model = DECODERS["experts"]().double()
    assert isinstance(model, Decoder)
    batch = sample("experts", 0)
    logits = model(batch.inputs)
    weight_B = (batch.targets != IGNORE_INDEX).sum(1)
    assert weight_B.unique().numel() == 2
    assert model.auxiliary_loss is not None
    loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    (loss + (model.auxiliary_loss * weight_B).sum() / weight_B.sum()).backward()
    norm = torch.cat([own.grad.flatten() for own in model.parameters()]).norm()
    first = one_rank().results[0]
    assert first.grad_norm == pytest.approx(norm.item(), abs=1e-12)
    assert first.loss == pytest.approx(loss.item(), abs=1e-12), "reported without them"


CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("classicdp", "experts", 3, {}),
    ("classicdp", "dropping", 2, {}),
    ("classicdp", "experts", 3, {"speeds": [1.0, 0.0, 2.0]}),
    ("fsdp", "experts", 2, {"overrides": {"stage": 2, "bucket_mb": 0.002}}),
    ("fsdp", "dropping", 3, {"overrides": {"stage": 3, "bucket_mb": 0.002}}),
    ("fsdp", "experts", 3, {"overrides": {"stage": 3}, "speeds": [1.0, 0.0, 2.0]}),
    ("syncps", "experts", 3, {}),
    ("mp_pipeline", "dropping", 2, {}),
    ("mp_pipeline", "experts", 3, {"staleness": 1}),
    ("classicdp", "experts", 2, {"staleness": 1}),
]


@pytest.mark.parametrize(("algorithm", "model", "world_size", "keys"), CASES)
def test_all_algorithms_equal_single(
    algorithm: str, model: str, world_size: int, keys: dict[str, Any]
) -> None:
    reference = one_rank(model, keys.get("staleness", 0))
    for trace in train(algorithm, model, world_size, steps=5, **keys):
        assert difference(trace, reference) <= 1e-12
        assert trace.losses == pytest.approx(reference.losses, abs=1e-12)
        # The routers of a rank that only takes part in collectives have counted nothing.
        if algorithm != "syncps" and "speeds" not in keys:
            assert tokens_of(trace) == tokens_of(reference)


def test_the_tokens_of_all_experts_are_counted() -> None:
    for model, has_dropped in (("experts", False), ("dropping", True)):
        for found in tokens_of(one_rank(model)):
            assert found is not None
            tokens, dropped = found
            layers = len(tokens)
            assert sum(map(sum, tokens)) + dropped == layers * 12 * 8 * 2
            assert (dropped > 0) is has_dropped
    assert expert_tokens(train("single", "decoder", 1, steps=1)[0].results[0].stats) is None


def test_the_losses_of_routers_are_scaled_as_the_loss_is(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: dict[tuple[float, str], float | None] = {}
    for weight in (0.0, 1.0):
        for precision in ("float32", "fp16"):
            make = functools.partial(experts, balance_loss=weight, z_loss=weight)
            monkeypatch.setitem(DECODERS, "weighted", make)
            keys: dict[str, Any] = {"steps": 1, "more": {"expected_weight": 4096}}
            (trace,) = train("single", "weighted", 1, precision=precision, **keys)
            norms[weight, precision] = trace.results[0].grad_norm
    assert norms[1.0, "fp16"] == pytest.approx(norms[1.0, "float32"], rel=0.02)
    assert (norms[1.0, "float32"] or 0) > 2 * (norms[0.0, "float32"] or 0), (
        "half of it at least is theirs"
    )
