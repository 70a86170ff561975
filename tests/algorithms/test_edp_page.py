"""The short version on docs/algorithms/edp.md is what the algorithm computes, and its bytes are
those that travel."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smolrun.events import PushDropped
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks
from tests.algorithms import parameter_server as ps
from tests.waiting import until

PAGE = Path(__file__).parents[2] / "docs" / "algorithms" / "edp.md"


def naive() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert 20 <= len([line for line in code.splitlines() if line]) <= 40
    names: dict[str, Any] = {}
    exec(code, names)
    return names["naive_edp"]


@pytest.mark.parametrize("model", ["language_model", "mlp"])
def test_the_page_is_right(model: str) -> None:
    net = ps.start(model)
    plain = {
        "grad_clip": 0.0,
        "learning_rate": lambda step: 0.05,
        "make_optimizer": functools.partial(ps.make_sgd, lr=0.05),
    }
    seen = run_ranks(
        4, lambda mesh: ps.fit(ps.place(mesh, net, more=plain), model, 10), elastic=True
    )[0]

    def samples(item: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = ps.samples(model, item // 3, item % 3, 3)
        return batch.inputs.double() if model == "mlp" else batch.inputs, batch.targets

    arrivals = [(push.rank, push.ticket, push.version) for push in seen.pushes]
    assert max(push.age for push in seen.pushes) > 0
    found = naive()(copy.deepcopy(net), arrivals, samples, 0.05)
    for name, value in seen.parameters.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-12)


def test_the_bytes_of_the_page_travel() -> None:
    wide = nn.Sequential(nn.Linear(9, 40_000), nn.Tanh(), nn.Linear(40_000, 5))
    size = 4 * sum(parameter.numel() for parameter in wide.parameters())

    def rank_main(mesh: Mesh) -> tuple[int, int, int]:
        if mesh.rank == 0:
            until(lambda: len(mesh.present) == 2)
        seen = ps.fit(ps.place(mesh, wide, precision="float32"), "mlp", 10)
        dropped = sum(isinstance(event, PushDropped) for event in seen.events)
        return mesh.bytes_sent, mesh.bytes_received, dropped

    (sent, received, _), *_ = run_ranks(3, rank_main, kind="tcp", elastic=True)
    # 20 pushes; weights go to both at the beginning, and the last of each may not leave any more.
    assert received / size == pytest.approx(20, rel=0.02)
    assert 18 * 0.98 <= sent / size <= 22 * 1.02
