"""A layer of experts against a loop over tokens, its losses, and what it drops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from smolrun.errors import ConfigError
from smolrun.models.feed_forward import MixtureOfExperts, route
from smolrun.models.shape import MoeShape
from tests.models.tiny import MOE, enliven, make_tiny_decoder

SHAPE = MoeShape(**MOE)


def layer_of_experts(**keys: object) -> MixtureOfExperts:
    model = enliven(make_tiny_decoder(layers=1, moe={**MOE, **keys})).double()
    layer = model.blocks["0"].feed_forward
    assert isinstance(layer, MixtureOfExperts)
    return layer


def hidden(batch: int = 3, tokens: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, tokens, 32, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("is_normed", [True, False])
def test_a_token_is_the_weighted_sum_of_its_experts(is_normed: bool) -> None:
    layer, inputs = layer_of_experts(norm_topk_prob=is_normed), hidden()
    output, routing = layer(inputs)
    for token, found in zip(inputs.flatten(0, 1), output.flatten(0, 1), strict=True):
        probs = (layer.router.weight @ token).softmax(0)
        weights, chosen = probs.topk(2)
        weights = weights / weights.sum() if is_normed else weights
        pairs = zip(weights, chosen.tolist(), strict=True)
        expected = sum(weight * layer.experts[str(expert)](token) for weight, expert in pairs)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert int(routing.tokens_E.sum()) == 60
    assert routing.dropped == 0


def test_the_losses_of_a_sequence_do_not_depend_on_its_company() -> None:
    layer, inputs = layer_of_experts(), hidden()
    together = layer(inputs)[1].auxiliary_B
    alone = torch.cat([layer(one)[1].auxiliary_B for one in inputs.split(1)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-15)
    assert together.unique().numel() == 3


def test_the_losses_are_those_of_their_papers() -> None:
    logits = torch.randn(1, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for keys in ({"balance_loss": 0.5, "z_loss": 0.0}, {"balance_loss": 0.0, "z_loss": 0.5}):
        _, routing = route(logits, MoeShape(**{**MOE, **keys}), None)
        probs = logits[0].softmax(-1)
        share = torch.zeros(4, dtype=torch.float64)
        for row in probs:
            share[row.topk(2).indices] += 1 / 14
        balance = 0.5 * 4 * (share * probs.mean(0)).sum()
        z = 0.5 * logits[0].exp().sum(-1).log().square().mean()
        assert routing.auxiliary_B.item() == pytest.approx(
            (balance if keys["balance_loss"] else z).item(), abs=1e-14
        )


def test_balanced_experts_have_the_least_loss() -> None:
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1)[None] * 9
    one = torch.zeros_like(even)
    one[..., 2] = 9.0
    shape = MoeShape(**{**MOE, "experts_per_token": 1, "balance_loss": 1.0, "z_loss": 0.0})
    assert route(even, shape, None)[1].auxiliary_B.item() == pytest.approx(1.0, abs=1e-12)
    assert route(one, shape, None)[1].auxiliary_B.item() > 3.9


def test_a_full_expert_drops_second_choices_and_later_tokens_first() -> None:
    # Two experts for each of four tokens; expert 0 is the first choice of all but the last one.
    logits = torch.tensor([[[9.0, 5, 0, 0], [9, 0, 5, 0], [9, 0, 0, 5], [5, 9, 0, 0]]])
    assignments, routing = route(logits, SHAPE, 2)
    by_expert = assignments.token_A.split(routing.tokens_E.tolist())
    assert [part.tolist() for part in by_expert] == [[0, 1], [0, 3], [1], [2]]
    assert routing.dropped == 2
    # Of another sequence nothing is dropped because of this one.
    both, routing = route(torch.cat([logits, logits]), SHAPE, 2)
    assert routing.dropped == 4
    assert set(both.token_A.tolist()) == set(range(8))


def test_capacity_holds_in_training_only() -> None:
    layer, inputs = layer_of_experts(capacity_factor=0.5), hidden()
    assert layer.moe.capacity(10) == 3
    assert layer(inputs)[1].tokens_E.max() <= 9
    assert layer(inputs)[1].dropped > 0
    assert layer.eval()(inputs)[1].dropped == 0
    assert MoeShape(**{**MOE, "capacity_factor": 1e-6}).capacity(1) == 1, "decoding drops nothing"


def test_an_expert_without_tokens_gets_zeros() -> None:
    layer, inputs = layer_of_experts(experts_per_token=1), hidden().requires_grad_()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = inputs.mean((0, 1))  # and equal logits go to the first
    output, routing = layer(inputs)
    assert 0 in routing.tokens_E.tolist()
    output.square().sum().backward()
    idle = [number for number, count in enumerate(routing.tokens_E.tolist()) if not count]
    for number in idle:
        assert all(not own.grad.any() for own in layer.experts[str(number)].parameters())
    assert layer.router.weight.grad is not None


def test_recomputed_blocks_have_equal_gradients_and_count_once() -> None:
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    plain = enliven(make_tiny_decoder(layers=2, moe=MOE)).double()
    again = copy.deepcopy(plain)
    again.recompute = True
    for model in (plain, again):
        logits = model(tokens)
        assert model.auxiliary_loss is not None
        (
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + model.auxiliary_loss.sum()
        ).backward()
        assert [int(one.tokens_E.sum()) for one in model.routing.values()] == [48, 48]
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-14), name
        assert one.grad.abs().max() > 0, f"{name} learns"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token=5: must be within 1 .. model.moe.experts=4"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: experts would take no token"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
    ],
)
def test_what_cannot_be_is_named(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tiny_decoder(moe={**MOE, **keys})
