"""fsdp, every stage: equal to `single` wherever shards are cut, whatever the model looks like, and
alike on all ranks when a gradient is not finite. Memory and bytes: test_fsdp_costs.py; checkpoints:
test_fsdp_saved.py."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smolrun.algorithms.fsdp import GradientShards, OptimizerShards, ParameterShards
from smolrun.models.initialise import build_shell, first_value
from smolrun.parts.norms import LayerNorms
from smolrun.parts.unshard_on_access import UnshardOnAccess, layers_of
from tests.algorithms import worlds
from tests.algorithms.worlds import Trace, train
from tests.models.model_folders import save_model
from tests.models.test_huggingface import make as make_huggingface
from tests.models.tiny import GPT2, QWEN, enliven, make_tiny_decoder

STAGES = [0, 1, 2, 3]
CUT = [1, 2, 3]
# So small that every layer has several buckets, and cuts fall into the middle of parameters.
TINY_BUCKETS = {"bucket_mb": 0.0005, "max_live_buckets": 1}


def keys(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, **TINY_BUCKETS, **more}


def difference(one: Trace, other: Trace) -> float:
    pairs = [(one.parameters[name], other.parameters[name]) for name in other.parameters]
    return max((a - b).abs().max().item() for a, b in pairs)


def assert_equal(traces: list[Trace], reference: Trace, most: float = 1e-12) -> None:
    for trace in traces:
        assert difference(trace, reference) <= most
        assert trace.losses == pytest.approx(reference.losses, abs=most)
        assert [r.grad_norm for r in trace.results] == pytest.approx(
            [r.grad_norm for r in reference.results], abs=most
        )
        assert trace.eval is not None and reference.eval is not None
        assert trace.eval.loss == pytest.approx(reference.eval.loss, abs=10 * most)
        assert trace.eval.num_targets == reference.eval.num_targets
        assert trace.eval.correct == reference.eval.correct
        if reference.logits is not None and trace.logits is not None:
            assert torch.allclose(trace.logits, reference.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["language_model", "mlp"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_equals_single(stage: int, world_size: int, model: str) -> None:
    reference = train("single", model, 1)[0]
    assert_equal(train("fsdp", model, world_size, overrides=keys(stage)), reference)


@pytest.mark.parametrize("stage", CUT)
def test_equals_single_over_sockets_however_much_is_ahead(stage: int) -> None:
    reference = train("single", "language_model", 1)[0]
    for ahead in ({"prefetch": 0}, {"prefetch": 3, "max_live_buckets": 3}):
        traces = train("fsdp", "language_model", 3, overrides=keys(stage, **ahead), kind="tcp")
        assert_equal(traces, reference)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("world_size", [2, 5])
@pytest.mark.parametrize("stage", CUT)
def test_equals_single_with_an_optimizer_that_remembers(
    stage: int, world_size: int, optimizer: str
) -> None:
    reference = train("single", "language_model", 1, optimizer=optimizer)[0]
    traces = train("fsdp", "language_model", world_size, optimizer=optimizer, overrides=keys(stage))
    assert_equal(traces, reference, most=1e-9)


@pytest.mark.parametrize("micro_batch_size", [1, None])
@pytest.mark.parametrize("stage", CUT)
def test_shards_and_batches_may_be_uneven(stage: int, micro_batch_size: int | None) -> None:
    """A rank with hardly any memory, a rank without samples, and micro-batches that are empty."""
    reference = train("single", "language_model", 1)[0]
    traces = train(
        "fsdp",
        "language_model",
        3,
        speeds=[8.0, 0.01, 3.0],
        micro_batch_size=micro_batch_size,
        overrides=keys(stage),
        more={"shard_weights": (8.0, 1.0, 0.2)},
    )
    assert_equal(traces, reference)
    held = [
        sum(p.values.numel() for p in trace.pieces if p.key.startswith("model/"))
        for trace in traces
    ]
    assert held[0] > 5 * held[1] > 5 * held[2] > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_late_gradients_equal_a_simulated_delay(stage: int, bound: int, optimizer: str) -> None:
    reference = train("single", "language_model", 1, staleness=bound, optimizer=optimizer)[0]
    traces = train(
        "fsdp",
        "language_model",
        3,
        staleness=bound,
        optimizer=optimizer,
        overrides=keys(stage),
    )
    assert_equal(traces, reference, most=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "tied"])
@pytest.mark.parametrize("stage", [2, 3])
def test_decoders_of_all_kinds(
    stage: int, name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoder() -> nn.Module:
        model = enliven(make_tiny_decoder(**{"gpt2": GPT2, "qwen3": QWEN, "tied": {}}[name]))
        model.recompute = recompute
        return model

    monkeypatch.setitem(worlds.MODELS, "decoder", decoder)
    reference = train("single", "decoder", 1, steps=3)[0]
    traces = train("fsdp", "decoder", 3, steps=3, overrides=keys(stage, bucket_mb=0.01))
    assert_equal(traces, reference, most=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stage", [1, 3])
def test_models_of_transformers(
    stage: int, family: str, recompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path, family)

    def theirs() -> nn.Module:
        model = make_huggingface(folder)
        model.recompute = recompute
        return model

    monkeypatch.setitem(worlds.MODELS, "theirs", theirs)
    reference = train("single", "theirs", 1, steps=3)[0]
    assert_equal(train("fsdp", "theirs", 2, steps=3, overrides=keys(stage)), reference, most=1e-9)


class Recurrent(nn.Module):
    """Its layer keeps a list of its own parameters; some of them are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 17)
        self.embedding.weight.requires_grad_(False)
        self.head.bias.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0] * self.scale)


@pytest.mark.parametrize("stage", CUT)
def test_recurrent_and_frozen_layers_and_a_single_number(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(worlds.MODELS, "recurrent", Recurrent)
    reference = train("single", "recurrent", 1, optimizer="adamw")[0]
    traces = train("fsdp", "recurrent", 3, optimizer="adamw", overrides=keys(stage))
    assert_equal(traces, reference, most=1e-9)


@pytest.mark.parametrize("kind", ["gradients", "all"])
@pytest.mark.parametrize("stage", CUT)
def test_norms_of_layers_are_those_of_the_whole(stage: int, kind: Any) -> None:
    more = {"norms": LayerNorms(kind, 2)}
    reference = train("single", "language_model", 1, more=more)[0].results
    for trace in train("fsdp", "language_model", 3, overrides=keys(stage), more=more):
        for one, other in zip(trace.results, reference, strict=True):
            assert (one.norms is None) == (other.norms is None)
            for what, layers in (other.norms or {}).items():
                assert (one.norms or {})[what] == pytest.approx(layers, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_params"])
@pytest.mark.parametrize("stage", CUT)
def test_half_precision_learns_like_single(
    stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(worlds.MODELS, "decoder", lambda: enliven(make_tiny_decoder()))
    reference = train("single", "decoder", 1, precision=precision, steps=6)[0]
    traces = train("fsdp", "decoder", 2, precision=precision, steps=6, overrides=keys(stage))
    for trace in traces:
        assert trace.losses == pytest.approx(reference.losses, rel=0.02)
    kept = {"bf16_params": torch.bfloat16}.get(precision, torch.float32)
    assert {tensor.dtype for tensor in traces[0].parameters.values()} == {kept}


@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize("stage", CUT)
def test_a_nan_in_one_rank_is_skipped_by_all_and_named(
    stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worlds.sample

    def poisoned(model: str, step: int) -> worlds.Batch:
        batch = whole(model, step)
        if step == 4:
            batch.inputs[-1] = math.nan  # a sample of the last rank
        return batch

    monkeypatch.setattr(worlds, "sample", poisoned)
    more = {"expected_weight": 1 << 14}  # float16 begins with a scale that does not overflow here
    traces = train("fsdp", "mlp", 3, precision=precision, overrides=keys(stage), more=more)
    for trace in traces:
        skipped = [r.step for r in trace.results if r.grad_norm is None]
        assert skipped == [4]
        assert trace.results[4].nonfinite_ranks == (2,)
        assert len(trace.hashes) < 2 or stage == 3 or trace.hashes[3] == trace.hashes[4]
    assert all(torch.isfinite(tensor).all() for tensor in traces[0].parameters.values())


@pytest.mark.parametrize("stage", CUT)
def test_a_wrong_sum_would_be_seen(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: ranks that step by their own gradients."""
    reference = train("single", "language_model", 1)[0]
    cls = {1: OptimizerShards, 2: GradientShards, 3: ParameterShards}[stage]
    right = cls.summed

    def wrong(self: Any, pending: Any) -> list[torch.Tensor]:
        return [own * 0.9 for own in right(self, pending)]

    monkeypatch.setattr(cls, "summed", wrong)
    monkeypatch.setattr(worlds, "context", unclipped)
    assert (
        difference(train("fsdp", "language_model", 2, overrides=keys(stage))[0], reference) > 1e-6
    )


right_context = worlds.context


def unclipped(*args: Any) -> Any:
    return dataclasses.replace(right_context(*args), grad_clip=0.0)


def test_weights_that_nobody_gathered_are_loudly_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what is not whole is not a number, never an old value."""
    monkeypatch.setattr(UnshardOnAccess, "_use", lambda self, parameter: None)
    traces = train("fsdp", "mlp", 2, steps=2, overrides=keys(3))
    assert all(math.isnan(loss) for loss in traces[0].losses)


def test_small_layers_are_gathered_together_and_large_ones_alone() -> None:
    model = make_tiny_decoder()
    alone = layers_of(model, 0)
    assert [len(layer) for layer in alone] == [1, 9, 9, 9, 9, 1]
    assert [len(layer) for layer in layers_of(model, 1 << 30)] == [38]


def test_a_shell_has_no_memory_and_starts_as_the_whole_model_does() -> None:
    whole = make_tiny_decoder(seed=5)
    shell = build_shell(lambda: make_on_meta(), 5, dtype=torch.float32, device="cpu")
    for (name, one), other in zip(shell.named_parameters(), whole.parameters(), strict=True):
        assert one.untyped_storage().nbytes() <= 4
        assert torch.equal(first_value(shell, name, one, seed=5), other)


def make_on_meta() -> nn.Module:
    from smolrun.models.decoder import build
    from tests.models.tiny import TINY, Spec

    return build(Spec(), **TINY)
