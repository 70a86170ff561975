"""Every optimizer against its formula written out, and its state: saved and loaded bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from smolrun.errors import CheckpointError
from smolrun.parts.optimizer_state import init_optimizer_state, optimizer_state, state_shapes
from smolrun.training.optimizer import NAMES, lr_schedule, make_optimizer

KEYS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    "sgd": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "lion": {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1},
    "adafactor": {
        "lr": 1e-2,
        "beta2_decay": -0.8,
        "eps": [1e-15, 1e-3],
        "d": 1.0,
        "weight_decay": 0.1,
    },
}
PLAIN_SGD = {"lr": 1e-2, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
CASES = [*KEYS.items(), ("sgd", PLAIN_SGD)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Small(nn.Module):
    """A matrix, a vector and a number."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(7, 5, generator=generator))
        self.vector = nn.Parameter(torch.randn(5, generator=generator))
        self.number = nn.Parameter(torch.randn((), generator=generator))


def small(dtype: torch.dtype) -> Small:
    return Small().to(dtype)


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter.dtype)


def run(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)  # the trainer sets it anew for every update
        optimizer.step()


def bits(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "keys"), CASES, ids=lambda value: str(value)[:12])
def test_training_resumes_bit_for_bit_from_a_loaded_state(
    name: str, keys: dict[str, Any], dtype: torch.dtype
) -> None:
    straight, first, second = small(dtype), small(dtype), small(dtype)
    run(make_optimizer(straight.named_parameters(), name, seed=3, **keys), straight, range(6))
    optimizer = make_optimizer(first.named_parameters(), name, seed=3, **keys)
    run(optimizer, first, range(3))
    saved = optimizer_state(optimizer, first.named_parameters())
    second.load_state_dict(first.state_dict())
    resumed = make_optimizer(second.named_parameters(), name, seed=3, **keys)
    load(resumed, second.named_parameters(), saved)
    run(resumed, second, range(3, 6))
    assert all(map(torch.equal, bits(second), bits(straight)))
    run(optimizer, first, range(3, 6))  # what was loaded is a copy
    assert all(map(torch.equal, bits(first), bits(straight)))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sgd"}))
def test_training_differs_without_the_state(name: str) -> None:
    straight, first = small(torch.float32), small(torch.float32)
    run(make_optimizer(straight.named_parameters(), name, **KEYS[name]), straight, range(6))
    run(make_optimizer(first.named_parameters(), name, **KEYS[name]), first, range(3))
    run(make_optimizer(first.named_parameters(), name, **KEYS[name]), first, range(3, 6))
    assert not all(map(torch.equal, bits(first), bits(straight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "keys"), CASES, ids=lambda value: str(value)[:12])
def test_the_state_has_the_names_and_shapes_of_state_shapes(
    name: str, keys: dict[str, Any], dtype: torch.dtype
) -> None:
    model = small(dtype)
    optimizer = make_optimizer(model.named_parameters(), name, **keys)
    assert optimizer_state(optimizer, model.named_parameters()) == {}
    run(optimizer, model, range(2))
    state = optimizer_state(optimizer, model.named_parameters())
    promised = {
        f"{key}/{parameter_name}": shape
        for parameter_name, parameter in model.named_parameters()
        for key, shape in state_shapes(
            name,
            parameter.shape,
            has_momentum=keys.get("momentum", 0) > 0,
            is_rounded=dtype == torch.bfloat16,
        ).items()
    }
    assert {key: tuple(value.shape) for key, value in state.items()} == promised
    assert all(isinstance(value, Tensor) for value in state.values())


def load(optimizer: torch.optim.Optimizer, named: Any, state: dict[str, Tensor]) -> None:
    named = list(named)
    init_optimizer_state(optimizer, named, {path: value.dtype for path, value in state.items()})
    for path, tensor in optimizer_state(optimizer, named).items():
        tensor.copy_(state[path])


def saved_adamw() -> tuple[Small, dict[str, Tensor]]:
    model = small(torch.float32)
    optimizer = make_optimizer(model.named_parameters(), "adamw", **KEYS["adamw"])
    run(optimizer, model, range(2))
    return model, optimizer_state(optimizer, model.named_parameters())


@pytest.mark.parametrize("spoil", ["missing", "foreign", "other"])
def test_a_state_that_does_not_fit_is_refused_by_name(spoil: str) -> None:
    model, state = saved_adamw()
    if spoil == "missing":
        del state["exp_avg/vector"]
        message = r"lacks exp_avg/vector;"
    elif spoil == "foreign":
        state["exp_avg/stranger"] = torch.zeros(1)
        message = r"has exp_avg/stranger, which this run does not know"
    else:
        state = {key.replace("exp_avg/", "momentum/"): value for key, value in state.items()}
        message = r"lacks exp_avg/.* and has momentum/"
    optimizer = make_optimizer(model.named_parameters(), "adamw", **KEYS["adamw"])
    with pytest.raises(CheckpointError, match=message):
        load(optimizer, model.named_parameters(), state)
    assert not optimizer.state


def test_a_checkpoint_from_before_the_first_update_has_no_state() -> None:
    model = small(torch.float32)
    optimizer = make_optimizer(model.named_parameters(), "adamw", **KEYS["adamw"])
    load(optimizer, model.named_parameters(), {})
    run(optimizer, model, range(1))


def test_counters_stay_where_torch_keeps_them() -> None:
    """The meta device stands in for an accelerator: nothing is computed, only placed."""
    _, state = saved_adamw()
    there = Small().to("meta")
    for is_fused, device in ((True, "meta"), (False, "cpu")):
        optimizer = torch.optim.AdamW(there.parameters())
        optimizer.param_groups[0]["fused"] = is_fused
        load(optimizer, there.named_parameters(), state)
        placed = optimizer.state[there.matrix]
        assert placed["step"].device.type == device
        assert placed["exp_avg"].device.type == "meta"


def test_frozen_parameters_have_no_state() -> None:
    model = small(torch.float32)
    model.vector.requires_grad_(False)
    optimizer = make_optimizer(model.named_parameters(), "adamw", **KEYS["adamw"])
    before = model.vector.detach().clone()
    run(optimizer, model, range(2))
    state = optimizer_state(optimizer, model.named_parameters())
    assert not any(key.endswith("/vector") for key in state)
    assert torch.equal(model.vector, before)
    load(optimizer, model.named_parameters(), state)


def test_lion_is_the_algorithm_of_its_paper() -> None:
    model = small(torch.float64)
    optimizer = make_optimizer(
        model.named_parameters(), "lion", lr=0.01, betas=[0.9, 0.99], weight_decay=0.5
    )
    weights = model.matrix.detach().flatten().tolist()
    means = [0.0] * len(weights)
    for step in range(5):
        gradients(model, step)
        assert model.matrix.grad is not None
        for i, gradient in enumerate(model.matrix.grad.flatten().tolist()):
            direction = math.copysign(1.0, 0.9 * means[i] + 0.1 * gradient)
            weights[i] -= 0.01 * (direction + 0.5 * weights[i])
            means[i] = 0.99 * means[i] + 0.01 * gradient
        optimizer.step()
    assert model.matrix.flatten().tolist() == pytest.approx(weights, rel=1e-12)


def test_lion_in_small_batches_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = small(torch.float32), small(torch.float32)
    run(make_optimizer(whole.named_parameters(), "lion", **KEYS["lion"]), whole, range(3))
    monkeypatch.setattr("smolrun.training.optimizer._LION_BATCH", 3)
    run(make_optimizer(parts.named_parameters(), "lion", **KEYS["lion"]), parts, range(3))
    assert all(map(torch.equal, bits(whole), bits(parts)))


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_decay(name: str) -> None:
    model = small(torch.float32)
    before = bits(model)
    optimizer = make_optimizer(model.named_parameters(), name, **{**KEYS[name], "lr": 0.5})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not torch.equal(model.matrix, before[0])
    assert torch.equal(model.vector, before[1])
    assert torch.equal(model.number, before[2])


@pytest.mark.parametrize("name", NAMES)
def test_an_update_does_not_depend_on_the_number_of_threads(name: str) -> None:
    """Replicas on hosts with different numbers of cores must stay equal."""
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            model = nn.Linear(300, 700)
            with torch.no_grad():
                model.weight.copy_(
                    torch.randn(700, 300, generator=torch.Generator().manual_seed(1))
                )
                model.bias.zero_()
            run(make_optimizer(model.named_parameters(), name, **KEYS[name]), model, range(3))
            results.append(model.weight.detach())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="there are adamw, adafactor, lion, sgd"):
        make_optimizer(small(torch.float32).named_parameters(), "adam")


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 500),
    st.integers(0, 500),
    st.floats(0.0, 1.0),
)
def test_the_learning_rate_stays_within_bounds_and_peaks_after_the_warm_up(
    kind: str, steps: int, warmup: int, ratio: float
) -> None:
    rate = lr_schedule(
        kind, peak=2.0, steps=steps, warmup_steps=min(warmup, steps), min_ratio=ratio
    )
    rates = [rate(update) for update in range(steps)]
    assert all(0 < r <= 2.0 + 1e-9 for r in rates) or ratio == 0
    rising, falling = rates[: min(warmup, steps)], rates[min(warmup, steps) :]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("kind", "middle", "last"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_the_learning_rate_ends_at_its_minimum(kind: str, middle: float, last: float) -> None:
    rate = lr_schedule(kind, peak=1.0, steps=111, warmup_steps=10, min_ratio=0.1)
    assert rate(0) == pytest.approx(0.1) and rate(9) == rate(10) == 1.0
    assert rate(60) == pytest.approx(middle) and rate(110) == pytest.approx(last)
