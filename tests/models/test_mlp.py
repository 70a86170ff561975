"""The perceptron: shapes, first values, bad keys, and that it learns to read drawn digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from smolrun.data.digits import Digits
from smolrun.data.order import SampleOrder
from smolrun.data.splits import open_split
from smolrun.errors import ConfigError
from smolrun.models.initialise import build_model
from smolrun.models.mlp import MLP, build
from tests.models.tiny import Spec

KEYS: dict[str, Any] = {"widths": [256, 128], "activation": "relu"}
FEATURES = Spec(num_outputs=10, num_inputs=784, sequence_length=None)


def make(seed: int = 0, **keys: Any) -> MLP:
    model = build_model(
        lambda: build(FEATURES, **{**KEYS, **keys}), seed, dtype=torch.float32, device="cpu"
    )
    assert isinstance(model, MLP)
    return model


@pytest.mark.parametrize("widths", [[], [7], [256, 128]])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_logits_have_a_class_each_and_a_sensible_size(widths: list[int], activation: str) -> None:
    logits = make(widths=widths, activation=activation)(torch.rand(500, 784))
    assert logits.shape == (500, 10)
    assert 0.1 < logits.std() < 3


def test_without_hidden_layers_it_is_linear() -> None:
    model = make(widths=[])
    first, second = torch.rand(2, 1, 784)
    torch.testing.assert_close(model(first + second), model(first) + model(second))


@pytest.mark.parametrize(
    ("spec", "keys", "message"),
    [
        (Spec(), {}, "model=mlp reads features"),
        (FEATURES, {"widths": [3, 0]}, r"model.widths=\[3, 0\]"),
        (FEATURES, {"activation": "tanh"}, "must be one of relu, gelu"),
    ],
)
def test_bad_keys_are_named(spec: Spec, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(spec, **{**KEYS, **keys})


def test_it_reads_more_than_nine_of_ten_unseen_digits(tmp_path: Path) -> None:
    data = Digits(tmp_path, train_size=4000, eval_size=500, noise=0.2, seed=0).prepare(
        lambda *_: None
    )
    train, held_out = open_split(data, "train", verify=True), open_split(data, "eval", verify=True)
    order = SampleOrder(len(train), 0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        batch = train.batch(order.indices(32 * step, 32 * step + 32))
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
    batch = held_out.batch(range(len(held_out)))
    accuracy = (model(batch.inputs).argmax(-1) == batch.targets).float().mean()
    assert accuracy > 0.9
