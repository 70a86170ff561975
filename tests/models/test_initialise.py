"""First values: equal for every layer range and device, different for every name and seed; users'
own modules.
"""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smolrun.errors import ConfigError
from smolrun.models.base import Init
from smolrun.models.decoder import build
from smolrun.models.initialise import build_model, draw, initialise
from tests.models.tiny import TINY, MakeDecoder, Spec


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return build(Spec(), **TINY)


def test_building_costs_no_memory_and_initialising_fills_all() -> None:
    model = on_meta()
    assert all(parameter.is_meta for parameter in model.parameters())
    filled = initialise(model, 0, dtype=torch.float32, device="cpu")
    assert filled is model
    assert all(
        not parameter.is_meta and parameter.isfinite().all() for parameter in model.parameters()
    )


@settings(max_examples=20, deadline=None)
@given(
    first=st.integers(0, 3),
    length=st.integers(1, 4),
    seed=st.integers(0, 2**63),
    ends=st.booleans(),
)
def test_values_do_not_depend_on_the_layer_range(
    first: int, length: int, seed: int, ends: bool
) -> None:
    last = min(3, first + length - 1)
    whole = build_model(
        lambda: build(Spec(), **TINY), seed, dtype=torch.float32, device="cpu"
    ).state_dict()
    with torch.device("meta"):
        stage = build(Spec(), first, last, ends, ends, **TINY)
    for name, value in (
        initialise(stage, seed, dtype=torch.float32, device="cpu").state_dict().items()
    ):
        assert torch.equal(value, whole[name]), name


def test_seeds_and_names_give_different_values(make_decoder: MakeDecoder) -> None:
    first, second = make_decoder(seed=0).state_dict(), make_decoder(seed=1).state_dict()
    name = "blocks.0.attention.query.weight"
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], first["blocks.1.attention.query.weight"])
    assert torch.equal(first[name], make_decoder(seed=0).state_dict()[name])


def test_other_dtypes_start_from_the_same_float32_numbers() -> None:
    exact = initialise(on_meta(), 3, dtype=torch.float32, device="cpu").state_dict()
    for dtype in (torch.float64, torch.bfloat16):
        for name, value in initialise(on_meta(), 3, dtype=dtype, device="cpu").state_dict().items():
            assert torch.equal(value, exact[name].to(dtype))


def test_values_follow_the_rule() -> None:
    shape = torch.Size((200, 300))
    assert abs(draw(Init("normal", 0.3), "x", shape, 0).std() - 0.3) < 0.01
    assert draw(Init("zeros"), "x", shape, 0).eq(0).all()
    assert draw(Init("ones"), "x", shape, 0).eq(1).all()


class Shared(nn.Module):
    """Two modules, one parameter; and a buffer that must be computed."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.empty(4), persistent=False)

    def init_rule(self, name: str, parameter: torch.Tensor) -> Init:
        return Init("normal", 1.0)

    def reset_buffers(self) -> None:
        self.table = torch.arange(4.0, device=self.table.device)


def test_shared_parameters_stay_shared_and_buffers_are_computed() -> None:
    with torch.device("meta"):
        model = Shared()
    initialise(model, 0, dtype=torch.float32, device="cpu")
    assert model.first.weight is model.second.weight
    assert not model.first.weight.is_meta
    assert model.table.tolist() == [0, 1, 2, 3]


class Ordinary(nn.Module):
    """A user's module: no init_rule, a constructor of its own mind."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.own = nn.Parameter(torch.full((2,), random.random() + float(numpy.random.rand())))
        self.register_buffer("scale", torch.tensor(3.0))


def test_a_users_module_is_built_for_real_from_the_seed() -> None:
    models = [
        build_model(Ordinary, seed, dtype=torch.float64, device="cpu").state_dict()
        for seed in (7, 7, 8)
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["layer.weight"], models[2]["layer.weight"])
    assert not torch.equal(models[0]["own"], models[2]["own"])
    assert models[0]["scale"] == 3.0
    assert models[0]["layer.weight"].dtype == torch.float64


def test_building_leaves_the_random_generators_as_they_were() -> None:
    def state() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())

    before = state()
    build_model(Ordinary, 1, dtype=torch.float32, device="cpu")
    assert state() == before


def test_a_constructor_that_cannot_run_on_meta_is_run_for_real() -> None:
    def make() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.weight.abs().sum().item()  # meta tensors have no values
        return layer

    model = build_model(make, 0, dtype=torch.float32, device="cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_errors_of_a_constructor_are_shown() -> None:
    def make() -> nn.Module:
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"):
        build_model(make, 0, dtype=torch.float32, device="cpu")


def test_an_empty_module_without_a_rule_is_refused() -> None:
    with torch.device("meta"):
        model = Ordinary()
    with pytest.raises(ConfigError, match="does not say how 'own' starts"):
        initialise(model, 0, dtype=torch.float32, device="cpu")
