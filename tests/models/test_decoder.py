"""The decoder: causality, windows, stages of layers, recomputation, bad keys."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from smolrun.errors import ConfigError
from smolrun.models.decoder import build
from tests.models.tiny import GPT2, KINDS, TINY, MakeDecoder, Spec, enliven


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("keys", KINDS)
def test_a_future_token_never_changes_past_logits(
    make_decoder: MakeDecoder, keys: dict[str, Any]
) -> None:
    model = enliven(make_decoder(**keys))
    before = tokens(2, 20)
    after = before.clone()
    after[:, 11] = (after[:, 11] + 1) % 61
    first, second = model(before), model(after)
    assert torch.equal(first[:, :11], second[:, :11])
    assert not torch.allclose(first[:, 11:], second[:, 11:])


def test_a_window_hides_what_lies_further_back(make_decoder: MakeDecoder) -> None:
    model = enliven(make_decoder(layers=1, sliding_window=4))
    before = tokens(1, 20)
    after = before.clone()
    after[:, 6] = (after[:, 6] + 1) % 61
    differs = (model(before) - model(after)).abs().amax(dim=(0, 2)) > 1e-6
    assert differs.nonzero().flatten().tolist() == [
        6,
        7,
        8,
        9,
    ]  # itself and three behind it see token 6


def test_a_window_as_long_as_the_text_changes_nothing(make_decoder: MakeDecoder) -> None:
    wide, plain = make_decoder(sliding_window=20), make_decoder()
    assert torch.equal(wide(tokens(2, 20)), plain(tokens(2, 20)))
    near, far = make_decoder(sliding_window=19), make_decoder()
    assert not torch.equal(near(tokens(2, 20)), far(tokens(2, 20)))


@pytest.mark.parametrize("keys", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (1, 2, 3)])
def test_stretches_of_layers_are_the_whole_model_cut(
    make_decoder: MakeDecoder, keys: dict[str, Any], cuts: tuple[int, ...]
) -> None:
    whole = make_decoder(seed=5, **keys)
    borders = [0, *cuts, 4]
    stages = [
        make_decoder((first, stop - 1, first == 0, stop == 4), seed=5, **keys)
        for first, stop in pairwise(borders)
    ]
    parameters = whole.state_dict()
    seen: set[str] = set()
    for stage in stages:
        for name, value in stage.state_dict().items():
            assert torch.equal(value, parameters[name]), name
            seen.add(name)
    assert seen == set(parameters)
    hidden = tokens(2, 9)
    for stage in stages:
        hidden = stage(hidden)
    assert torch.equal(hidden, whole(tokens(2, 9)))


def test_only_a_tied_embedding_is_held_twice(make_decoder: MakeDecoder) -> None:
    for tied in (True, False):
        first = make_decoder((0, 1, True, False), tie_embeddings=tied)
        last = make_decoder((2, 3, False, True), tie_embeddings=tied)
        shared = set(first.state_dict()) & set(last.state_dict())
        assert shared == ({"token_embedding.weight"} if tied else set())


@pytest.mark.parametrize("keys", KINDS)
def test_recompute_gives_equal_gradients(make_decoder: MakeDecoder, keys: dict[str, Any]) -> None:
    gradients = []
    for recompute in (False, True):
        model = make_decoder(**keys)
        model.recompute = recompute
        inputs = tokens(2, 12)
        F.cross_entropy(model(inputs).flatten(0, 1), inputs.flatten()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other), name


def test_recompute_runs_each_block_again_in_backward(make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    calls: list[str] = []
    for name, block in model.blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model.recompute = True
    loss = model(tokens(1, 6)).sum()
    assert calls == ["0", "1", "2", "3"]
    loss.backward()
    assert calls[4:] == ["3", "2", "1", "0"]


@pytest.mark.parametrize("keys", [{}, GPT2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_arithmetic_works(
    make_decoder: MakeDecoder, keys: dict[str, Any], dtype: torch.dtype
) -> None:
    model = make_decoder(kv_heads=2, qk_norm=True, **keys)
    exact = model(tokens(1, 12))
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", torch.bfloat16):
            result = model(tokens(1, 12))
    else:
        result = model.to(dtype)(tokens(1, 12))
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.float(), exact, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0
    )


def test_a_first_loss_is_that_of_guessing(make_decoder: MakeDecoder) -> None:
    inputs = tokens(4, 40)
    loss = F.cross_entropy(make_decoder()(inputs).flatten(0, 1), inputs.roll(-1, 1).flatten())
    assert abs(loss.item() - math.log(61)) < 0.2


def test_too_long_a_sequence_is_refused(make_decoder: MakeDecoder) -> None:
    with pytest.raises(ValueError, match="49 tokens passes max_sequence_length=48"):
        make_decoder()(tokens(1, 49))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"heads": 5}, "model.heads=5: must divide model.width=32"),
        ({"kv_heads": 3}, "model.kv_heads=3: must divide model.heads=4"),
        ({"head_width": 7}, "model.head_width=7: must be even"),
        ({"layers": 0}, "model.layers=0: must be at least 1"),
        ({"norm": "batchnorm"}, "model.norm='batchnorm': must be one of rmsnorm, layernorm"),
        ({"attention_bias": "all"}, "must be one of true, false, qkv"),
        ({"sliding_window": 0}, "must be at least 1, or null"),
        (
            {"max_sequence_length": 47},
            "data.sequence_length=48 is more than model.max_sequence_length=47",
        ),
    ],
)
def test_bad_keys_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Spec(), **{**TINY, **keys})


def test_all_bad_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        build(Spec(), **{**TINY, "layers": 0, "norm": "x", "activation": "y"})
    assert len(error.value.problems) == 3


def test_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="a gpt model reads tokens"):
        build(Spec(sequence_length=None, num_inputs=784), **TINY)
