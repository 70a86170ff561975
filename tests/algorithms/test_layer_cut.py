"""Which rank holds which layers: by speed, given or measured, and by memory."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from smolrun.algorithms.layer_cut import copies_held, cut_layers
from smolrun.errors import ConfigError
from smolrun.mesh.mesh import Mesh
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.step_clock import EmulatedPace
from smolrun.testing import run_ranks
from smolrun.training.optimizer import make_optimizer
from tests.algorithms import worlds
from tests.algorithms.test_mp import placed


def cut_for(num_stages: int, layers: Any = None, **more: Any) -> list[range]:
    precision = PRECISIONS["float64"]
    return cut_layers(worlds.decoder(6), layers, num_stages, precision=precision, copies=4, **more)


def test_the_cut_follows_speeds_and_memory() -> None:
    assert cut_for(3) == [range(2), range(2, 4), range(4, 6)]
    assert cut_for(2, speeds=(2.0, 1.0)) == [range(4), range(4, 6)]
    layer = 8 * 4 * sum(p.numel() for p in worlds.decoder(6).blocks["0"].parameters())
    assert cut_for(2, speeds=(2.0, 1.0), memory_bytes=(3.5 * layer, 1e12))[0] == range(3)


@pytest.mark.parametrize(
    ("seconds", "layers"),
    [([0.11, 0.1, 0.09], [2, 2, 2]), ([0.1, 0.2, 0.4], [4, 1, 1]), ([0.4, 0.4, 0.1], [1, 1, 4])],
)
def test_all_ranks_cut_alike_by_what_each_has_measured(
    seconds: list[float], layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences as small as those between measurements of one machine count as none."""
    measured = lambda model, run, clock: seconds[run.__self__.stage]  # noqa: E731
    monkeypatch.setattr("smolrun.algorithms.layer_cut._layer_s", measured)

    def rank_main(mesh: Mesh) -> tuple[int, str]:
        runner = placed(mesh, worlds.decoder(6), speeds=None)
        return len(runner.layers), runner.note

    found, notes = zip(*run_ranks(3, rank_main), strict=True)
    assert list(found) == layers
    assert len(set(notes)) == 1 and notes[0].startswith("speeds as measured: rank 0 layer")


def test_a_rank_that_is_slower_is_measured_before_the_cut() -> None:
    def rank_main(mesh: Mesh) -> int:
        torch.manual_seed(0)
        model = worlds.decoder(6).double()
        before = copy.deepcopy(model.state_dict())
        more = {"pace": EmulatedPace(0.2)} if mesh.rank else {}
        runner = placed(mesh, model, speeds=None, **more)
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in after)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert runner.clock.take() == (0.0, 0.0)
        return len(runner.layers)

    fast, slow = run_ranks(2, rank_main)
    assert fast > slow


@pytest.mark.parametrize(
    ("optimizer", "precision", "staleness", "copies"),
    [
        ("adamw", "float32", 0, 4),
        ("adamw", "bf16_params", 2, 6),
        ("lion", "float32", 0, 3),
        ("adafactor", "float32", 0, 2),
    ],
)
def test_what_a_rank_holds_of_a_weight(
    optimizer: str, precision: str, staleness: int, copies: int
) -> None:
    make = functools.partial(make_optimizer, name=optimizer)
    assert copies_held(make, PRECISIONS[precision], staleness) == copies


@pytest.mark.parametrize(
    ("stages", "layers", "more", "why"),
    [
        (7, None, {}, "6 layers, too few for 7 ranks"),
        (
            2,
            [[0, 2], [4, 5]],
            {},
            r"layers=\[\[0,2\],\[4,5\]\]: rank 1.*do not continue at layer 3",
        ),
        (2, [[0, 3], [3, 5]], {}, "do not continue at layer 4"),
        (2, [[0, 2], [3, 4]], {}, "end with layer 4"),
        (2, [[0, 5]], {}, "1 stages for 2 ranks"),
        (2, [[0, 5], []], {}, "every rank needs a layer"),
        (2, None, {"memory_bytes": (9e3, 9e3)}, "no cut fits the ranks' memory_gb"),
    ],
)
def test_cuts_that_cannot_be(stages: int, layers: Any, more: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        cut_for(stages, layers, **more)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Sequential cannot be cut .*model=gpt_tiny"):
        run_ranks(2, lambda mesh: placed(mesh, worlds.mlp()))
