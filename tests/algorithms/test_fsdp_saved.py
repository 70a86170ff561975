"""Checkpoints of fsdp: exact at the same world size, and whole at any other, for any stage, and for
the algorithms that keep replicas; and not so where something is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.optimizer_shards import OptimizerShards
from smolrun.errors import CheckpointError
from tests.algorithms import worlds
from tests.algorithms.test_saved import STEPS, contents, run_part, same

CUT = [1, 2, 3]


def keys(stage: int | None) -> dict[str, Any]:
    """Of fsdp with buckets so small that cuts fall into the middle of parameters; None: of others,
    which have none of them."""
    return {"overrides": None if stage is None else {"stage": stage, "bucket_mb": 0.0005}}


def worst(one: Path, other: Path) -> float:
    expected, found = contents(one), contents(other)
    assert expected.keys() == found.keys()
    pairs = [(expected[key], found[key]) for key in expected if "facts" not in key]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("precision", ["float64", "bf16", "fp16", "bf16_params"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("stage", "bound"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0)])
def test_it_goes_on_to_the_same_bytes(
    tmp_path: Path, stage: int, bound: int, optimizer: str, precision: str
) -> None:
    more = {**keys(stage), "staleness": bound, "optimizer": optimizer, "precision": precision}
    whole, _ = run_part(tmp_path / "a", "fsdp", 3, until=STEPS, **more)
    first, _ = run_part(tmp_path / "b", "fsdp", 3, until=4, **more)
    second, _ = run_part(tmp_path / "b", "fsdp", 3, until=STEPS, resume=first, **more)
    assert same(whole, second)


def test_any_stage_world_size_and_algorithm_goes_on_from_any_other(tmp_path: Path) -> None:
    whole, _ = run_part(tmp_path / "a", "single", 1, until=STEPS)
    checkpoint: Path | None = None
    turns = [
        ("fsdp", 3, 4), ("classicdp", None, 2), ("fsdp", 2, 5), ("fsdp", 1, 3), ("single", None, 1),
        ("fsdp", 3, 2), ("fsdp", 0, 3), ("fsdp", 3, 1), ("fsdp", 2, 2),
    ]  # fmt: skip
    assert len(turns) == STEPS
    for until, (algorithm, stage, world_size) in enumerate(turns, start=1):
        checkpoint, _ = run_part(
            tmp_path / "b", algorithm, world_size, until=until, resume=checkpoint, **keys(stage)
        )
    assert checkpoint is not None
    assert worst(whole, checkpoint) < 1e-12


def test_late_gradients_go_on_elsewhere_too(tmp_path: Path) -> None:
    whole, _ = run_part(tmp_path / "a", "classicdp", 2, until=STEPS, staleness=2)
    checkpoint: Path | None = None
    turns = [(2, "fsdp", 2, 3), (4, "classicdp", None, 2), (6, "fsdp", 1, 4), (STEPS, "fsdp", 2, 2)]
    for until, algorithm, stage, size in turns:
        more = {**keys(stage), "staleness": 2, "resume": checkpoint}
        checkpoint, _ = run_part(tmp_path / "b", algorithm, size, until=until, **more)
    assert checkpoint is not None
    assert worst(whole, checkpoint) < 1e-12


@pytest.mark.parametrize("stage", CUT)
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, stage: int) -> None:
    first, _ = run_part(tmp_path, "fsdp", 3, until=3, **keys(stage))
    for size, other in ((1, 3), (2, 1), (4, 2), (5, 3)):
        again, _ = run_part(
            tmp_path / f"{size}", "fsdp", size, until=3, resume=first, **keys(other)
        )
        assert same(first, again)


@pytest.mark.parametrize("stage", CUT)
def test_the_size_is_known_before(tmp_path: Path, stage: int) -> None:
    told: list[int] = []
    more = {**keys(stage), "precision": "bf16"}
    first, _ = run_part(tmp_path, "fsdp", 2, until=3, **more)
    hurt = lambda runner: told.append(runner.checkpoint_bytes())  # noqa: E731  (to look, not to hurt)
    run_part(tmp_path, "fsdp", 2, until=4, resume=first, hurt=hurt, **more)
    whole = sum(tensor.nbytes for tensor in contents(first).values())
    assert told == pytest.approx([whole, whole], abs=200)


def forget_moments(runner: Algorithm) -> None:
    runner.optimizer.state.clear()


def forget_late_gradients(runner: Algorithm) -> None:
    assert isinstance(runner, OptimizerShards)
    for pending in runner.pending_updates:
        for own in runner.summed(pending):
            own.zero_()


def take_a_neighbours_slice(runner: Algorithm) -> None:
    assert isinstance(runner, OptimizerShards)
    for _, parameter in runner.optimized_params[:1]:
        parameter.data.copy_(parameter.data.flip(-1))


@pytest.mark.parametrize(
    ("hurt", "stage", "bound"),
    [
        (forget_moments, 1, 0),
        (forget_moments, 3, 0),
        (forget_late_gradients, 1, 2),
        (forget_late_gradients, 2, 2),
        (take_a_neighbours_slice, 3, 0),
    ],
)
def test_whatever_is_left_out_is_seen(tmp_path: Path, hurt: Any, stage: int, bound: int) -> None:
    more = {**keys(stage), "staleness": bound}
    whole, _ = run_part(tmp_path / "a", "fsdp", 2, until=STEPS, **more)
    first, _ = run_part(tmp_path / "b", "fsdp", 2, until=4, **more)
    second, _ = run_part(tmp_path / "b", "fsdp", 2, until=STEPS, resume=first, hurt=hurt, **more)
    assert not same(whole, second)


@pytest.mark.parametrize("stage", CUT)
def test_another_model_or_optimizer_is_refused_by_name(tmp_path: Path, stage: int) -> None:
    first, _ = run_part(tmp_path, "fsdp", 2, until=2, **keys(stage))

    class More(worlds.TinyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(1, 1)

    class Other(worlds.TinyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(3, 4)

    class Less(worlds.TinyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(3, 3, bias=False)

    for model, named in ((More, "more"), (Other, "unused"), (Less, "unused.bias")):
        with pytest.raises(CheckpointError, match=f"another model: .*{named}"):
            run_part(tmp_path, "fsdp", 3, until=4, resume=first, model=model, **keys(stage))
    with pytest.raises(CheckpointError, match="optimizer"):
        run_part(tmp_path, "fsdp", 3, until=4, resume=first, optimizer="sgd", **keys(stage))
