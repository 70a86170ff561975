"""bfloat16 parameters: exact on average, equal on all replicas, for any size of pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from smolrun.training import stochastic_rounding
from smolrun.training.optimizer import NAMES, make_optimizer
from tests.training.test_optimizer import KEYS, bits, run, small

BFLOAT16 = torch.bfloat16


def parameter_after(steps: int, size: float, seed: int = 0, name: str = "w") -> torch.Tensor:
    """10,000 ones after `steps` updates by -size each."""
    parameter = nn.Parameter(torch.ones(10_000, dtype=BFLOAT16))
    keys = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
    optimizer = make_optimizer([(name, parameter)], "sgd", seed=seed, lr=1.0, **keys)
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
    return parameter.detach()


def test_updates_below_the_last_bit_add_up_on_average() -> None:
    size = 2.0**-14  # one 32nd of what is between 1 and its lower neighbour, 64 times
    plain = torch.ones(1, dtype=BFLOAT16)
    for _ in range(64):
        plain -= size
    assert plain.item() == 1.0  # rounding to the nearest loses them all
    after = parameter_after(64, size).double()
    expected = 1 - 64 * size
    assert after.mean().item() == pytest.approx(expected, abs=4 * after.std().item() / 100)
    assert len(after.unique()) > 1


def test_one_rounding_has_the_right_probability() -> None:
    after = parameter_after(1, 2.0**-9 + 2.0**-10)  # lower neighbour of 1: 1 - 2^-8
    lower = (after == 1 - 2.0**-8).double().mean().item()
    assert set(after.tolist()) == {1.0, 1 - 2.0**-8}
    assert lower == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 10_000))


def test_the_bits_follow_from_seed_name_and_update_alone() -> None:
    size = 2.0**-10
    once = parameter_after(3, size)
    assert torch.equal(once, parameter_after(3, size))
    assert not torch.equal(once, parameter_after(3, size, seed=1))
    assert not torch.equal(once, parameter_after(3, size, name="v"))


def test_bfloat16_numbers_and_infinity_are_kept() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-130, math.inf, -math.inf])
    target = torch.zeros(7, dtype=BFLOAT16)
    random_bits = stochastic_rounding._RandomBits(0, torch.device("cpu"))
    random_bits.begin(1, "w")
    random_bits.round_into(target, exact.clone(), "x")
    assert torch.equal(target.float(), exact)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_many_seeds_is_what_float32_gives(name: str) -> None:
    exact = small(torch.float32)
    start = [value.bfloat16().float() for value in bits(exact)]
    with torch.no_grad():
        for parameter, value in zip(exact.parameters(), start, strict=True):
            parameter.copy_(value)
    run(make_optimizer(exact.named_parameters(), name, **KEYS[name]), exact, range(1))
    total = [torch.zeros_like(value) for value in start]
    for seed in range(200):
        model = small(BFLOAT16)
        run(
            make_optimizer(model.named_parameters(), name, seed=seed, **KEYS[name]), model, range(1)
        )
        for sum_so_far, value in zip(total, bits(model), strict=True):
            sum_so_far += value.float() / 200
    # Gradients are rounded to bfloat16 before: 1/256 of an update of at most 0.02 a weight.
    for mean, parameter in zip(total, bits(exact), strict=True):
        tolerance = 4 * parameter.abs() * 2**-8 / math.sqrt(12 * 200) + 2e-3
        assert bool(((mean - parameter).abs() <= tolerance).all())


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_the_size_of_pieces_changes_only_the_random_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bits that are all zero, numbers are cut: then pieces must not matter at all."""

    def no_bits(*_: object, **__: object) -> torch.Tensor:
        return torch.zeros(2 * stochastic_rounding.PIECE, dtype=torch.int32)

    results = []
    monkeypatch.setattr(torch, "randint", no_bits)
    for piece in (3, 1000):
        monkeypatch.setattr(stochastic_rounding, "PIECE", piece)
        model = small(BFLOAT16)
        run(make_optimizer(model.named_parameters(), name, **KEYS[name]), model, range(4))
        results.append(bits(model))
    assert all(map(torch.equal, *results))


def test_a_parameter_that_is_not_contiguous_is_trained_too() -> None:
    parameter = nn.Parameter(torch.ones(4, 6, dtype=BFLOAT16).t())
    optimizer = make_optimizer([("w", parameter)], "adamw", **KEYS["adamw"])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bool((parameter < 1).all())


def test_no_float32_copy_is_kept_between_updates() -> None:
    parameter = nn.Parameter(torch.ones(1000, dtype=BFLOAT16))
    optimizer = make_optimizer([("w", parameter)], "adamw", **KEYS["adamw"])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if value.numel() > 1]
    assert {value.dtype for value in kept} == {BFLOAT16}
    assert len(kept) == 2
    assert isinstance(optimizer, stochastic_rounding.StochasticRounding)
    assert not optimizer.inner.state
    assert optimizer._work.numel() == 1
