"""The plan of a server: sizes, local or pipeline, hosts left out, and what does not fit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from smolrun.cli.compose import compose
from smolrun.estimate.serving_plan import (
    DoesNotFit,
    ServingPlan,
    ServingRank,
    first_that_fits,
    plan,
    weights_line,
)
from smolrun.models.decoder import Decoder
from smolrun.models.shape import DecoderShape, ModelBytes, model_bytes
from smolrun.serving.messages import ServingDtype
from smolrun.serving.weight_types import weight_options
from tests.models.tiny import TINY, make_tiny_decoder

GB = 1e9
# 10 layers of 1 GB, an embedding and a head of 0.5 GB, 1 MB of cache for a token of a layer.
MODEL = ModelBytes(10, 10**9, 5 * 10**8, 5 * 10**8, 0, 10**6)


def rank(host: str, gb: float = 100.0, layer_s: float = 0.001) -> ServingRank:
    return ServingRank(host, layer_s, layer_s / 10, gb * GB)


def of(*ranks: ServingRank, mode: str = "auto", **keys: object) -> ServingPlan:
    keys = {"slots": 1, "context": 256, "is_context_fixed": True, **keys}
    return plan(MODEL, ranks, mode=mode, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("parts", [[range(3)], [range(1), range(1, 3)], [range(2), range(2, 3)]])
def test_weights_are_those_of_the_stages(tie: bool, parts: list[range]):
    shape: DecoderShape = make_tiny_decoder(**{**TINY, "tie_embeddings": tie}).shape
    layers = [range(part.start, min(part.stop, shape.layers)) for part in parts]
    layers[-1] = range(layers[-1].start, shape.layers)
    sizes = model_bytes(shape, 61, 4)
    made = ServingPlan(layers, 2, 7, 1.0)
    for index, part in enumerate(layers):
        with torch.device("meta"):
            ends = (index == 0, index == len(layers) - 1)
            stage = Decoder(shape, 61, part.start, part.stop - 1, *ends)
        assert made.weight_bytes(sizes, index) == sum(one.nbytes for one in stage.parameters())
        cache = 2 * shape.kv_heads * shape.head_width * 4 * len(part) * 2 * 7
        assert made.cache_bytes(sizes, index) == cache
    assert sizes.weights == made.weight_bytes(sizes, 0) or len(layers) > 1


def test_what_fits_on_one_host_stays_on_the_fastest():
    assert of(rank("a"), rank("b")).layers == [range(10), range(0)]
    assert of(rank("a"), rank("b", layer_s=0.0005)).stages == [1]
    assert of(rank("a", gb=8), rank("b")).stages == [1]


def test_local_uses_the_first_host_alone_or_refuses():
    assert of(rank("a"), mode="local").stages == [0]
    with pytest.raises(DoesNotFit, match=r"10.2 GB of weights.* available: 7.5 GB; try more hosts"):
        of(rank("a", gb=8), mode="local")


def test_what_fits_on_no_host_is_cut_by_memory():
    made = of(rank("a", gb=6), rank("b", gb=9))
    assert made.stages == [0, 1]
    for index, gb in ((0, 6), (1, 9)):
        held = made.weight_bytes(MODEL, index) + made.cache_bytes(MODEL, index)
        assert held <= gb * GB


def test_pipeline_uses_equal_hosts_though_one_would_do():
    made = of(rank("a"), rank("b"), mode="pipeline")
    assert [len(part) for part in made.layers] == [5, 5]
    assert made.left_out == []


def test_an_earlier_cut_is_kept_while_it_is_about_as_fast():
    earlier = [range(6), range(6, 10)]
    slower = [rank("a", layer_s=0.0011), rank("b")]
    made = of(*slower, mode="pipeline", earlier=earlier)
    assert made.layers == earlier
    assert made.tokens_per_s == pytest.approx(1 / (0.0066 + 0.004 + 0.0001 + 0.002))
    # 6 x 0.0015 beside 4 x 0.0015: the best is 1.5 times as fast.
    much_slower = [rank("a", layer_s=0.0015), rank("b")]
    assert of(*much_slower, mode="pipeline", earlier=earlier).layers == [range(4), range(4, 10)]


@pytest.mark.parametrize(
    "earlier", [[range(5), range(5, 9)], [range(5), range(6, 10)], [range(10), range(10, 10)]]
)
def test_an_earlier_cut_of_another_model_or_other_ranks_is_no_cut(earlier: list[range]):
    made = of(rank("a"), rank("b"), mode="pipeline", earlier=earlier)
    assert made.layers == [range(5), range(5, 10)]


def test_an_earlier_cut_must_fit():
    ranks = [rank("a", gb=7.5), rank("b", gb=7.5)]
    assert of(*ranks, mode="pipeline").layers == [range(5), range(5, 10)]
    made = of(*ranks, mode="pipeline", earlier=[range(6), range(6, 10)])
    assert made.layers == [range(5), range(5, 10)]


def test_a_slow_host_is_left_out_and_named_unless_all_are_asked_for():
    ranks = [rank("a", gb=7), rank("pi5", gb=7, layer_s=0.02), rank("b", gb=7)]
    made = of(*ranks)
    assert made.stages == [0, 2]
    (left,) = made.left_out
    assert left.host == "pi5"
    assert left.without == made.tokens_per_s > 1.1 * left.with_it > 0
    assert of(*ranks, hosts="all").stages == [0, 1, 2]


def test_a_slow_host_stays_where_its_memory_is_needed():
    made = of(rank("a", gb=6), rank("pi5", gb=5, layer_s=0.02), rank("b", gb=5))
    assert made.stages == [0, 1, 2]
    assert made.left_out == []


def test_a_host_too_small_for_any_layer_is_left_out():
    made = of(rank("a", gb=7), rank("tiny", gb=0.5), rank("b", gb=7))
    assert made.stages == [0, 2]
    assert [left.host for left in made.left_out] == ["tiny"]


def test_tokens_per_second_add_up_stages_and_hops():
    made = of(rank("a"), rank("b", layer_s=0.003), mode="pipeline", layers=[[0, 5], [6, 9]])
    assert made.layers == [range(6), range(6, 10)]
    assert math.isclose(1 / made.tokens_per_s, 6 * 0.001 + 4 * 0.003 + 0.0003 + 2 * 0.001)


def test_slots_and_context_shrink_until_it_fits_unless_they_are_fixed():
    free = {"slots": None, "context": 256, "is_context_fixed": False}
    assert of(rank("a"), **free).slots == 8
    small = of(rank("a", gb=14), **free)  # 11 GB of weights
    assert (small.slots, small.capacity) == (1, 256)
    long = {**free, "context": 4096}
    assert of(rank("a", gb=14), **long).capacity == 256
    with pytest.raises(DoesNotFit, match=r"1 x 4096 tokens"):
        of(rank("a", gb=14), **{**long, "is_context_fixed": True})


@pytest.mark.parametrize(
    ("layers", "wrong"),
    [([[0, 9]], "1 stages for 2 ranks"), ([[0, 3], [5, 9]], "do not continue at layer 4")],
)
def test_wrong_layers_are_named(layers: list[list[int]], wrong: str):
    with pytest.raises(ValueError, match=wrong):
        of(rank("a"), rank("b"), mode="pipeline", layers=layers)


def test_given_layers_must_fit():
    with pytest.raises(DoesNotFit, match="one more host"):
        of(rank("a", gb=3), rank("b"), mode="pipeline", layers=[[0, 5], [6, 9]])


@pytest.mark.parametrize(("gb", "number"), [(14, 0), (9, 1), (6.5, 2)])
def test_the_first_type_of_weights_that_fits_is_taken(gb: float, number: int) -> None:
    models = [MODEL] + [
        replace(MODEL, layer=MODEL.layer // by, embedding=MODEL.embedding // by) for by in (2, 4)
    ]
    config = compose(["task=serve", "serving.slots=1", "serving.context=256"])
    found = [rank("a", gb, layer_s=0.01)]
    taken, made = first_that_fits(config, models, 256, found)
    assert (taken, made.layers) == (number, [range(10)])
    # The time of a layer, measured in the first type, goes with its bytes; the head stays.
    assert made.tokens_per_s == pytest.approx(1 / (0.1 / 2**number + 0.001))
    with pytest.raises(DoesNotFit, match=r"2\.9 GB of weights.* available: 1\.9 GB"):
        first_that_fits(config, models, 256, [rank("a", 2)])


def test_the_choice_of_a_type_is_said_with_its_reason() -> None:
    models: dict[ServingDtype, ModelBytes] = {"bf16": MODEL, "int8": replace(MODEL, layer=10**8)}
    assert weights_line(models, 0) == "10.2 GB of weights as bf16"
    assert weights_line(models, 1) == (
        "1.9 GB of weights as int8, as 10.2 GB of weights as bf16 would not fit"
    )


@pytest.mark.parametrize(
    ("asked", "stored", "tried"),
    [
        ("auto", "float32", ["float32", "int8", "int4"]),
        ("auto", "bf16", ["bf16", "int8", "int4"]),
        ("auto", "int8", ["int8", "int4"]),
        ("auto", "int4", ["int4"]),
        ("bf16", "float32", ["bf16"]),
        ("float32", "int4", ["float32"]),
    ],
)
def test_types_that_are_tried(
    asked: ServingDtype, stored: ServingDtype, tried: list[ServingDtype]
) -> None:
    shape = make_tiny_decoder(**TINY).shape
    options = weight_options(asked, stored, shape, 61)
    assert list(options) == tried
    sizes = [model.weights for model in options.values()]
    assert sizes == sorted(sizes, reverse=True)
