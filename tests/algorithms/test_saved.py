"""Going on from a checkpoint: the same bytes as if nothing had happened, on as many ranks or
others, and not so where something is left out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smolrun.algorithms.base import Algorithm, Context
from smolrun.algorithms.contract import STEP_STATS, StepStats
from smolrun.checkpoints.folder import commit, part_folder
from smolrun.checkpoints.manifest import merge
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.writer import write_shard
from smolrun.errors import CheckpointError
from smolrun.mesh.mesh import Mesh
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.replicas import parameter_hash
from smolrun.targets import keywords, load_target
from smolrun.testing import run_ranks
from tests.algorithms import worlds

STEPS = 9
Hurt = Callable[[Algorithm], None]


def restore(
    runner: Algorithm, resume: Path, takes_all: bool = True, hurt: Hurt = lambda algorithm: None
) -> None:
    with CheckpointReader(resume) as checkpoint:
        if takes_all:
            runner.restore(checkpoint, checkpoint.manifest.state["algorithm"])
        else:
            runner.load_weights(checkpoint)
    hurt(runner)


def run_part(
    tmp_path: Path,
    algorithm: str,
    world_size: int,
    *,
    until: int,
    resume: Path | None = None,
    takes_all: bool = True,  # of the checkpoint; else the weights alone
    model: Callable[[], torch.nn.Module] = worlds.TinyLanguageModel,
    staleness: int = 0,
    optimizer: str = "adamw",
    precision: str = "float64",
    shift: int = 0,
    hurt: Hurt = lambda algorithm: None,
    speeds: list[float] | None = None,
    overrides: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,  # other fields of the context
) -> tuple[Path, list[str]]:
    """Trains until `until` updates are done and saves; returns checkpoint and every rank's hash."""
    file = worlds.CONF / "algorithm" / f"{algorithm}.yaml"
    section = {**yaml.safe_load(file.read_text()), **(overrides or {})}
    torch.manual_seed(0)
    start = model().to(PRECISIONS[precision].parameters)
    part = part_folder(tmp_path, until, f"{random.getrandbits(32):x}")

    def rank_main(mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any], str]:
        context = worlds.context(mesh, precision, optimizer, staleness)
        runner = placed(section, dataclasses.replace(context, **(more or {})), start)
        if resume is not None:
            restore(runner, resume, takes_all, hurt)
        plan = worlds.plan_of(runner, speeds)
        updates = runner.steps_begun - len(runner.pending_updates)
        while updates < until:
            batch = worlds.sample("language_model", runner.steps_begun + shift)
            share = worlds.share(batch, plan, runner.steps_begun)
            updates += runner.train_step(share) is not None
        replica = runner.replica_tensors().values() or runner.model.parameters()
        written = write_shard(part, mesh.rank, worlds.to_write(runner))
        return written, runner.state(), parameter_hash(replica)

    told = run_ranks(world_size, rank_main)
    manifest = merge(
        [report for report, _, _ in told],
        step=until,
        run_id="test",
        config_hash="hash",
        world_size=world_size,
        state={"algorithm": told[0][1]},
    )
    return commit(part, manifest), [digest for _, _, digest in told]


def placed(section: dict[str, Any], context: Context, start: torch.nn.Module) -> Algorithm:
    runner: Algorithm = load_target(section["target"])(context, **keywords(section))
    runner.place(copy.deepcopy(start))
    return runner


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(checkpoint) as opened:
        return {key: opened.read(key) for key in opened.keys("")}


def same(one: Path, other: Path) -> bool:
    first, second = contents(one), contents(other)
    # `facts` hold seconds.
    keys = [key for key in first if not key.endswith("/facts")]
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in keys)


def world_sizes(algorithm: str) -> tuple[int, ...]:
    return (1,) if algorithm == "single" else (1, 3)


CASES = [(name, size) for name in worlds.ALGORITHMS for size in world_sizes(name)]


@pytest.mark.parametrize("algorithm", worlds.ALGORITHMS)
def test_a_new_run_begins_with_the_weights_of_another(tmp_path: Path, algorithm: str) -> None:
    """Of another algorithm, number of ranks and dtype; and with nothing else of it."""
    trained, _ = run_part(tmp_path / "a", "single", 1, until=3)
    size = world_sizes(algorithm)[-1]
    keys: dict[str, Any] = {"resume": trained, "takes_all": False, "precision": "float32"}
    begun, _ = run_part(tmp_path / "b", algorithm, size, until=0, **keys)
    before, after = contents(trained), contents(begun)
    weights = [key for key in before if key.startswith("model/")]
    assert weights and all(torch.equal(before[key].float(), after[key]) for key in weights)
    assert not any(key.startswith("optimizer/") and torch.any(after[key]) for key in after)
    averages = [key for key in after if key.startswith("average/")]
    assert all(torch.equal(after[key], after[f"model/{key[8:]}"]) for key in averages)
    assert CheckpointReader(begun).manifest.state["algorithm"]["steps_begun"] == 0
    # Trained on, it is what a run is that began with these values: replicas and pulled weights too.
    further, _ = run_part(tmp_path / "c", algorithm, size, until=2, **keys)
    alone, _ = run_part(tmp_path / "d", "single", 1, until=2, **keys)
    first, second = contents(further), contents(alone)
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in weights)
    assert not any(torch.equal(first[key], after[key]) for key in weights[:1])


def test_a_new_run_begins_with_averaged_weights_where_there_are_some(tmp_path: Path) -> None:
    """As evaluation, export and `smolrun.load` use them."""
    averaging = {"overrides": {"ema_decay": 0.5}}
    trained, _ = run_part(tmp_path / "a", "syncps", 3, until=3, **averaging)
    before = contents(trained)
    averages = [key for key in before if key.startswith("average/")]
    assert averages and any(not torch.equal(before[k], before[f"model/{k[8:]}"]) for k in averages)
    begun, _ = run_part(tmp_path / "b", "fsdp", 2, until=0, resume=trained, takes_all=False)
    after = contents(begun)
    assert all(torch.equal(before[key], after[f"model/{key[8:]}"]) for key in averages)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    trained, _ = run_part(tmp_path / "a", "single", 1, until=1)
    with pytest.raises(Exception, match="is of another model"):
        run_part(
            tmp_path / "b",
            "single",
            1,
            until=0,
            resume=trained,
            takes_all=False,
            model=lambda: Wider(),
        )


class Wider(worlds.TinyLanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(("algorithm", "world_size"), CASES)
@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adafactor"])
def test_a_run_that_goes_on_equals_one_that_never_stopped(
    tmp_path: Path, algorithm: str, world_size: int, staleness: int, optimizer: str
) -> None:
    if why := worlds.refusal(algorithm, staleness, optimizer):
        pytest.skip(why)
    keys = {"staleness": staleness, "optimizer": optimizer}
    whole, hashes = run_part(tmp_path / "a", algorithm, world_size, until=STEPS, **keys)
    at = random.randrange(1, STEPS)
    first, _ = run_part(tmp_path / "b", algorithm, world_size, until=at, **keys)
    second, again = run_part(
        tmp_path / "b", algorithm, world_size, until=STEPS, resume=first, **keys
    )
    assert again == hashes
    assert same(whole, second), f"stopped after {at}"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_params"])
def test_every_precision_goes_on_exactly(tmp_path: Path, precision: str) -> None:
    whole, _ = run_part(tmp_path / "a", "classicdp", 2, until=STEPS, precision=precision)
    first, _ = run_part(tmp_path / "b", "classicdp", 2, until=4, precision=precision)
    second, _ = run_part(
        tmp_path / "b", "classicdp", 2, until=STEPS, resume=first, precision=precision
    )
    assert same(whole, second)


@pytest.mark.parametrize("staleness", [0, 2])
def test_other_numbers_of_ranks_go_on_with_the_same_state(tmp_path: Path, staleness: int) -> None:
    """2 -> 3 -> 1 -> 4 -> 2 ranks learn the same as 2 that never stopped."""
    whole, _ = run_part(tmp_path / "a", "classicdp", 2, until=STEPS, staleness=staleness)
    checkpoint: Path | None = None
    for until, world_size in ((2, 2), (4, 3), (6, 1), (8, 4), (STEPS, 2)):
        checkpoint, hashes = run_part(
            tmp_path / "b",
            "classicdp",
            world_size,
            until=until,
            resume=checkpoint,
            staleness=staleness,
        )
        assert len(set(hashes)) == 1
    assert checkpoint is not None
    expected, found = contents(whole), contents(checkpoint)
    assert expected.keys() == found.keys()
    worst = max(
        (expected[key] - found[key]).abs().max().item() for key in expected if "facts" not in key
    )
    assert worst < 1e-12


def test_what_is_loaded_is_what_was_saved_at_every_world_size(tmp_path: Path) -> None:
    first, _ = run_part(tmp_path, "classicdp", 3, until=3, staleness=2)
    before = contents(first)
    for world_size in (1, 2, 4):
        # Not one more step: saved again as it was loaded.
        loaded, _ = run_part(
            tmp_path / str(world_size), "classicdp", world_size, until=3, resume=first, staleness=2
        )
        after = contents(loaded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before if "facts" not in key)


@pytest.mark.parametrize(("algorithm", "world_size"), CASES)
def test_random_draws_go_on_too(tmp_path: Path, algorithm: str, world_size: int) -> None:
    keys: dict[str, Any] = {"model": worlds.Noisy, "more": {"reseed": worlds.reseed}}
    whole, _ = run_part(tmp_path / "a", algorithm, world_size, until=STEPS, **keys)
    first, _ = run_part(tmp_path / "b", algorithm, world_size, until=4, **keys)
    second, _ = run_part(tmp_path / "b", algorithm, world_size, until=STEPS, resume=first, **keys)
    assert same(whole, second)


def forget_the_seed(algorithm: Algorithm) -> None:
    other = functools.partial(worlds.reseed, 12345)
    object.__setattr__(algorithm.context, "reseed", other)


def forget_the_schedule(algorithm: Algorithm) -> None:
    later = algorithm.context.learning_rate
    object.__setattr__(algorithm.context, "learning_rate", lambda update: later(update - 4))


def forget_the_optimizer(algorithm: Algorithm) -> None:
    algorithm.optimizer.state.clear()


def forget_gradients_in_flight(algorithm: Algorithm) -> None:
    for pending in algorithm.pending_updates:
        for gradient in algorithm.pending_gradients(pending):
            gradient.zero_()


@pytest.mark.parametrize(
    ("hurt", "shift"),
    [
        (forget_the_seed, 0),
        (forget_the_schedule, 0),
        (forget_the_optimizer, 0),
        (forget_gradients_in_flight, 0),
        (lambda algorithm: None, 1),
    ],
    ids=["random numbers", "schedule", "optimizer", "gradients in flight", "data position"],
)
def test_whatever_is_left_out_is_seen(tmp_path: Path, hurt: Hurt, shift: int) -> None:
    """The negative controls: the comparison above can fail, for each part of the state."""
    keys: dict[str, Any] = {"model": worlds.Noisy, "staleness": 2}
    keys["more"] = {"reseed": worlds.reseed}
    whole, _ = run_part(tmp_path / "a", "single", 1, until=STEPS, **keys)
    first, _ = run_part(tmp_path / "b", "single", 1, until=4, **keys)
    second, _ = run_part(
        tmp_path / "b", "single", 1, until=STEPS, resume=first, hurt=hurt, shift=shift, **keys
    )
    assert not same(whole, second)


@pytest.mark.parametrize("algorithm", ["classicdp", "syncps"])
def test_a_checkpoint_without_names_of_statistics_resumes(
    tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions wrote it."""

    def restore_old(runner: Algorithm, resume: Path, *_: Any) -> None:
        with CheckpointReader(resume) as checkpoint:
            state = dict(checkpoint.manifest.state["algorithm"])
            del state["step_stats"]
            runner.restore(checkpoint, state)

    monkeypatch.setattr("tests.algorithms.test_saved.restore", restore_old)
    whole, _ = run_part(tmp_path / "a", algorithm, 2, until=STEPS, staleness=2)
    first, _ = run_part(tmp_path / "b", algorithm, 2, until=4, staleness=2)
    second, _ = run_part(tmp_path / "b", algorithm, 2, until=STEPS, resume=first, staleness=2)
    assert same(whole, second)


@pytest.mark.parametrize("columns", [6, 7])
def test_statistics_of_a_step_in_flight_resume_on_other_ranks(columns: int) -> None:
    """The oldest checkpoints have no column for changed buffers."""
    table = torch.tensor([[2.0, 3, 1, 0.5, 1, 8, 0], [4.0, 5, 0, 0.7, 0, 6, 1]]).double()
    saved = StepStats(STEP_STATS[:columns], range(2), table[:, :columns])
    for ranks in (range(1), range(3)):
        found = saved.resumed((*STEP_STATS, "new"), ranks)
        assert (found.total("loss_sum"), found.total("num_targets")) == (6.0, 8.0)
        assert not any(found.column("is_finite"))
        assert not any(found.column("compute_s") + found.column("wants_stop"))
        assert found.column("samples") == [8.0, 6.0, 0.0][: len(ranks)]
        assert found.column("changed_buffer") == [float(columns == 7)] * len(ranks)
        assert found.total("new") == 0


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    first, _ = run_part(tmp_path, "single", 1, until=2)

    class Wider(worlds.TinyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(3, 4)

    class Renamed(worlds.TinyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(1, 1)

    for model, named in ((Wider, "unused"), (Renamed, "more")):
        with pytest.raises(CheckpointError, match=f"another model: .*{named}"):
            run_part(tmp_path / named, "single", 1, until=4, resume=first, model=model)


def test_another_optimizer_or_bound_is_refused(tmp_path: Path) -> None:
    first, _ = run_part(tmp_path, "classicdp", 2, until=2, staleness=1)
    with pytest.raises(CheckpointError, match="optimizer"):
        run_part(tmp_path, "classicdp", 2, until=4, resume=first, staleness=1, optimizer="sgd")
    with pytest.raises(CheckpointError, match="1 gradients in flight"):
        run_part(tmp_path, "classicdp", 2, until=4, resume=first)
