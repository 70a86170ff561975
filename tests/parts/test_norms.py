"""Norms layer by layer, against torch's own over the layer's tensors together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smolrun.parts.norms import NO_NORMS, LayerNorms, by_layer, layer_of


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.attention.query.weight", "blocks.3"),
        ("model.model.layers.11.mlp.up.weight", "model.model.layers.11"),
        ("token_embedding.weight", "token_embedding"),
        ("0.weight", "0"),
        ("scale", "scale"),
    ],
)
def test_a_parameter_belongs_to_its_layer(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_a_layer_has_one_norm() -> None:
    one, two = torch.randn(5, 3), torch.randn(7)
    norms = by_layer([("0.weight", one), ("0.bias", two), ("1.weight", two)])
    assert norms["0"] == pytest.approx(torch.cat([one.flatten(), two]).norm().item(), rel=1e-6)
    assert norms["1"] == pytest.approx(two.norm().item(), rel=1e-6)


def test_gradients_parameters_and_updates_of_one_step() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    net(torch.randn(4, 3)).sum().backward()  # type: ignore[no-untyped-call]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    measured = LayerNorms("all", 2).begin(4, net.named_parameters())
    assert measured is not None
    optimizer.step()
    norms = measured.finish()
    assert norms.keys() == {"gradients", "parameters", "updates"}
    for layer in ("0", "1"):
        assert norms["updates"][layer] == pytest.approx(0.1 * norms["gradients"][layer], rel=1e-4)
    assert norms["parameters"] == by_layer(net.named_parameters())


def test_they_are_taken_only_when_they_are_due() -> None:
    net = nn.Linear(2, 2)
    assert LayerNorms("gradients", 3).begin(4, net.named_parameters()) is None
    assert NO_NORMS.begin(0, net.named_parameters()) is None
    measured = LayerNorms("gradients", 3).begin(3, net.named_parameters())
    assert measured is not None and measured.finish() == {"gradients": {}}
