"""Every algorithm in conf/algorithm against `single` on the same global batches. A new yaml is
tested the day it is written.

`single` itself is tested against a loop that a reader can hold in mind.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from smolrun.algorithms.classicdp import ClassicDP
from smolrun.models.decoder import build
from smolrun.parts.placement import shares
from smolrun.targets import keywords
from tests.algorithms.worlds import (
    ALGORITHMS,
    CONF,
    DECODERS,
    GLOBAL_BATCH,
    MODELS,
    SPLIT,
    Noisy,
    Trace,
    refusal,
    reseed,
    sample,
    train,
)
from tests.models.tiny import Spec

WORLDS = {"single": [1]}  # every other algorithm runs on these
ALL_WORLDS = [1, 2, 3, 4, 5]


def difference(one: Trace, other: Trace) -> float:
    """The largest difference of any parameter."""
    pairs = [(one.parameters[name], other.parameters[name]) for name in one.parameters]
    return max((a - b).abs().max().item() for a, b in pairs)


CASES = [
    (name, world, model)
    for name in ALGORITHMS
    for world in WORLDS.get(name, ALL_WORLDS)
    for model in MODELS
]
CASES += [case for case in itertools.product(SPLIT, [1, 2, 3], DECODERS) if case[2] != "dropping"]


@pytest.mark.parametrize(("algorithm", "world_size", "model"), CASES)
def test_equals_single_on_the_same_global_batches(
    algorithm: str, world_size: int, model: str
) -> None:
    reference = train("single", model, 1)[0]
    traces = train(algorithm, model, world_size)
    for trace in traces:
        assert difference(trace, reference) <= 1e-12
        assert trace.losses == pytest.approx(reference.losses, abs=1e-12)
        assert [r.num_targets for r in trace.results] == [r.num_targets for r in reference.results]
        assert [r.grad_norm for r in trace.results] == pytest.approx(
            [r.grad_norm for r in reference.results], abs=1e-12
        )
    assert reference.eval is not None
    evaluations = [trace.eval for trace in traces if trace.eval is not None]
    assert traces[0].eval is not None, "a rank may leave it to rank 0"
    for found in evaluations:
        assert found.loss == pytest.approx(reference.eval.loss, abs=1e-10)
        assert (found.num_targets, found.correct) == (
            reference.eval.num_targets,
            reference.eval.correct,
        )


ON_TORCH = [case for case in CASES if case[1] < 5]
FEW_ON_TORCH = [(name, 1 if name == "single" else 3, "language_model") for name in ALGORITHMS]
FEW_ON_TORCH += [(name, 2, "tied") for name in SPLIT]


@pytest.mark.parametrize(
    ("algorithm", "world_size", "model"),
    [pytest.param(*c, marks=[] if c in FEW_ON_TORCH else pytest.mark.soak) for c in ON_TORCH],
)
def test_torch_distributed_gives_what_our_own_mesh_gives(
    algorithm: str, world_size: int, model: str
) -> None:
    reference = train("single", model, 1)[0]
    ours = train(algorithm, model, world_size)
    for trace, same in zip(train(algorithm, model, world_size, kind="torch"), ours, strict=True):
        assert difference(trace, reference) <= 1e-12
        assert difference(trace, same) <= 1e-12
        assert trace.losses == pytest.approx(same.losses, abs=1e-12)
        assert [r.grad_norm for r in trace.results] == pytest.approx(
            [r.grad_norm for r in reference.results], abs=1e-12
        )


DRAWING = [(name, None) for name in ALGORITHMS if name not in ("single", "fsdp")]
DRAWING += [("fsdp", {"stage": stage}) for stage in (1, 2, 3)]


@pytest.mark.parametrize(("algorithm", "overrides"), DRAWING)
def test_random_draws_follow_the_samples_wherever_they_are(
    algorithm: str, overrides: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "noisy", Noisy)
    keys: dict[str, Any] = {"steps": 4, "more": {"reseed": reseed}}
    reference = train("single", "noisy", 1, **keys)[0]
    for trace in train(algorithm, "noisy", 4, overrides=overrides, **keys):
        assert difference(trace, reference) <= 1e-12
    # A negative control: draws that are equal on all ranks are others than these.
    keys["more"] = {"reseed": lambda *words: reseed(0)}
    assert (
        difference(train(algorithm, "noisy", 4, overrides=overrides, **keys)[0], reference) > 1e-4
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("staleness", [0, 1, 4])
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "single"])
def test_staleness_equals_a_single_process_that_simulates_the_delay(
    algorithm: str, staleness: int, optimizer: str
) -> None:
    if why := refusal(algorithm, staleness, optimizer):
        pytest.skip(why)
    reference = train("single", "mlp", 1, staleness=staleness, optimizer=optimizer)[0]
    for trace in train(algorithm, "mlp", 3, staleness=staleness, optimizer=optimizer):
        assert difference(trace, reference) <= 1e-11
        assert len(trace.results) == 10, "every gradient is applied, the last ones by drain"


@pytest.mark.parametrize("kind", ["memory", "tcp", pytest.param("torch", marks=pytest.mark.soak)])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "single"])
def test_replicas_are_bit_equal_after_every_update(
    algorithm: str, precision: str, kind: str
) -> None:
    if why := refusal(algorithm, 1, "adamw"):
        pytest.skip(why)
    traces = train(
        algorithm,
        "language_model",
        3,
        precision=precision,
        staleness=1,
        optimizer="adamw",
        kind=kind,
    )
    assert traces[0].hashes == traces[1].hashes == traces[2].hashes
    assert len(set(traces[0].hashes)) > 5, "and they do change"


@pytest.mark.parametrize("speeds", [[3.0, 1.0], [1.0, 0.0, 2.0], [4.0, 2.0, 1.0, 1.0]])
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "single"])
def test_shares_by_speed_change_who_computes_but_not_what(
    algorithm: str, speeds: list[float]
) -> None:
    reference = train("single", "language_model", 1)[0]
    traces = train(algorithm, "language_model", len(speeds), speeds=speeds, micro_batch_size=2)
    for trace in traces:
        assert difference(trace, reference) <= 1e-12
        assert {result.samples for result in trace.results} == {tuple(shares(GLOBAL_BATCH, speeds))}


def gpt_small(narrow: bool, tied: bool, recompute: bool) -> torch.nn.Module:
    """Of conf/model, or with narrower layers."""
    keys = keywords(yaml.safe_load((CONF / "model" / "gpt_small.yaml").read_text()))
    keys |= {"width": 24, "heads": 6} if narrow else {}
    model = build(Spec(num_outputs=17), **{**keys, "tie_embeddings": tied})
    model.recompute = recompute
    return model


@functools.cache
def one_rank(narrow: bool, tied: bool, staleness: int) -> Trace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DECODERS, "gpt_small", functools.partial(gpt_small, narrow, tied, False))
        return train("single", "gpt_small", 1, steps=5, staleness=staleness, optimizer="adamw")[0]


WHOLE = [(False, True, False), (False, False, False), (False, True, True)]


@pytest.mark.parametrize(
    ("narrow", "tied", "recompute"),
    [(True, True, True), *(pytest.param(*keys, marks=pytest.mark.soak) for keys in WHOLE)],
)
@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("schedule", ["mp", "1f1b", "gpipe"])
def test_six_layers_on_four_stages_equal_single(
    schedule: str,
    staleness: int,
    narrow: bool,
    tied: bool,
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = functools.partial(gpt_small, narrow, tied, recompute)
    monkeypatch.setitem(DECODERS, "gpt_small", make)
    reference = one_rank(narrow, tied, staleness)
    algorithm = "mp" if schedule == "mp" else "mp_pipeline"
    keys: dict[str, Any] = {"steps": 5, "staleness": staleness, "optimizer": "adamw"}
    overrides = {} if schedule == "mp" else {"schedule": schedule}
    traces = train(algorithm, "gpt_small", 4, overrides=overrides, **keys)
    assert traces[0].parameters.keys() == reference.parameters.keys()
    print(f"{schedule}, K={staleness}: parameters {difference(traces[0], reference):.1e}")
    assert difference(traces[0], reference) < 1e-11
    for trace in traces:
        assert trace.losses == pytest.approx(reference.losses, abs=1e-11)


def plain_loop(model: str, *, steps: int, staleness: int) -> tuple[list[float], torch.nn.Module]:
    """Training as in a textbook: mean loss of the whole batch, clip, momentum SGD; gradients wait
    `staleness` steps."""
    torch.manual_seed(0)
    net = MODELS[model]().double()
    vectors = [p for p in net.parameters() if p.ndim < 2]
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    losses: list[float] = []
    waiting: list[list[torch.Tensor]] = []
    for step in range(steps + staleness):
        if step < steps:
            batch = sample(model, step)
            inputs = batch.inputs.double() if batch.inputs.is_floating_point() else batch.inputs
            loss = cross_entropy(net(inputs).flatten(0, -2), batch.targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            waiting.append(
                [
                    torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for p in net.parameters()
                ]
            )
        if step >= staleness:
            for parameter, gradient in zip(net.parameters(), waiting.pop(0), strict=True):
                parameter.grad = gradient
            norm = torch.cat(
                [p.grad.flatten() for p in net.parameters() if p.grad is not None]
            ).norm()
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.grad *= min(1.0, 0.5 / norm.item())
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (1 + step - staleness)
            optimizer.step()
    return losses, net


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("staleness", [0, 2])
def test_single_is_a_textbook_loop(model: str, staleness: int) -> None:
    losses, net = plain_loop(model, steps=10, staleness=staleness)
    trace = train("single", model, 1, staleness=staleness, micro_batch_size=None)[0]
    assert trace.losses == pytest.approx(losses, abs=1e-12)
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter, trace.parameters[name], rtol=0, atol=1e-12)


def test_the_comparison_can_tell_a_wrong_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: ranks that keep their own gradients instead of summing them."""
    reference = train("single", "language_model", 1)[0]
    monkeypatch.setattr(ClassicDP, "_on_full", lambda self, bucket, slot: None)
    assert difference(train("classicdp", "language_model", 2)[0], reference) > 1e-6
