"""The driver's side: a checkpoint exists when all ranks have written, and not one report sooner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from smolrun.checkpoints.committer import CheckpointCommitter
from smolrun.checkpoints.find import checkpoints_in, read_manifest
from smolrun.checkpoints.folder import part_folder
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import Saver
from smolrun.events import CheckpointSaved, EvalDone, Event, Note, ShardFailed, ShardSaved


def committer(path: Path, heard: list[Event], **keys: Any) -> CheckpointCommitter:
    settings: dict[str, Any] = {"world_size": 2, "keep": 2, "keep_best": False, **keys}
    return CheckpointCommitter(
        path, "token", run_id="run", config_hash="hash", emit=heard.append, **settings
    )


def shard(path: Path, updates: int, rank: int) -> ShardSaved:
    """What a rank reports after it has really written."""
    told: list[ShardSaved | ShardFailed] = []
    saver = Saver(path, "token", rank, told.append)
    values = torch.full((4,), float(updates))
    state = {"run": {"training": updates}} if rank == 0 else {}
    saver.save(updates, [TensorSlice("weights", (8,), 4 * rank, values)], state)
    values.zero_()  # training goes on; the saver has its own copy
    saver.finish()
    assert isinstance(told[0], ShardSaved)
    return told[0]


def save(
    path: Path, committer: CheckpointCommitter, updates: int, loss: float | None = None
) -> None:
    if loss is not None:
        committer.record(EvalDone(updates - 1, loss, 10))
    for rank in (1, 0):
        assert committer.record(shard(path, updates, rank))


def test_a_checkpoint_is_there_when_the_last_rank_has_told(tmp_path: Path) -> None:
    heard: list[Event] = []
    made = committer(tmp_path, heard)
    made.record(shard(tmp_path, 5, 1))
    assert checkpoints_in(tmp_path) == [] and heard == []
    made.record(shard(tmp_path, 5, 0))
    ((step, path),) = checkpoints_in(tmp_path)
    manifest = read_manifest(path)
    assert (step, manifest.step, manifest.run_id) == (5, 5, "run")
    assert manifest.state["training"] == 5
    (told,) = heard
    assert isinstance(told, CheckpointSaved)
    assert (told.step, told.folder) == (4, path.name)
    assert made.newest == path and made.failure is None


def test_a_rank_that_cannot_write_costs_the_checkpoint_not_the_run(tmp_path: Path) -> None:
    heard: list[Event] = []
    made = committer(tmp_path, heard)
    save(tmp_path, made, 2)
    made.record(ShardFailed(4, 0, "No space left on device"))
    made.record(shard(tmp_path, 4, 1))
    assert [step for step, _ in checkpoints_in(tmp_path)] == [2]
    assert not part_folder(tmp_path, 4, "token").exists()
    assert isinstance(heard[-1], Note) and heard[-1].level == "warning"
    assert "after 4 steps could not be written: rank 0: No space left on device" in str(heard[-1])
    assert "the last one is step-00000002" in str(heard[-1])
    assert made.failure is not None
    save(tmp_path, made, 6)
    assert made.failure is None, "the next one went well"


def test_reports_that_do_not_fit_together_make_no_checkpoint(tmp_path: Path) -> None:
    heard: list[Event] = []
    made = committer(tmp_path, heard)
    made.record(shard(tmp_path, 3, 0))
    broken = shard(tmp_path, 3, 1)
    broken.report["tensors"]["weights"]["pieces"][0]["stop"] = 7
    made.record(broken)
    assert checkpoints_in(tmp_path) == []
    assert made.failure is not None and "weights" in made.failure


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    made = committer(tmp_path, [], keep_best=True)
    for updates, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(tmp_path, made, updates, loss)
    assert [step for step, _ in checkpoints_in(tmp_path)] == [5, 4, 2]
    # A driver that goes on with the run knows which one was the best.
    again = committer(tmp_path, [], keep_best=True, keep=1)
    save(tmp_path, again, 6, 1.5)
    assert [step for step, _ in checkpoints_in(tmp_path)] == [6, 2]
    save(tmp_path, again, 7, 0.5)
    assert [step for step, _ in checkpoints_in(tmp_path)] == [7]


def test_an_unfinished_save_leaves_nothing_when_the_run_ends(tmp_path: Path) -> None:
    made = committer(tmp_path, [])
    made.record(shard(tmp_path, 3, 0))
    assert part_folder(tmp_path, 3, "token").exists()
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_what_the_driver_must_remember_is_asked_for(tmp_path: Path) -> None:
    made = committer(tmp_path, [], driver_state=lambda updates: {"rows": updates * 10})
    save(tmp_path, made, 3)
    assert made.newest is not None
    assert read_manifest(made.newest).state["driver"] == {"rows": 30}


def test_other_events_are_for_others_too(tmp_path: Path) -> None:
    assert not committer(tmp_path, []).record(EvalDone(3, 1.0, 5))


@pytest.mark.parametrize("what", ["a file in the way", "a tensor that cannot be saved"])
def test_a_saver_tells_what_went_wrong_and_lives(tmp_path: Path, what: str) -> None:
    told: list[ShardSaved | ShardFailed] = []
    folder = tmp_path / "checkpoints"
    if what == "a file in the way":
        folder.write_text("not a folder")
    saver = Saver(folder, "token" if what == "a file in the way" else "to/ken", 1, told.append)
    for updates in (1, 2):
        saver.save(updates, [TensorSlice("weights", (2,), 0, torch.ones(2))], {})
    saver.finish()
    assert [(type(event), event.updates, event.rank) for event in told] == [
        (ShardFailed, 1, 1),
        (ShardFailed, 2, 1),
    ]
    assert all(isinstance(event, ShardFailed) and event.reason for event in told)


def test_what_lies_behind_a_link_is_not_pruned(tmp_path: Path) -> None:
    heard: list[Event] = []
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real, target_is_directory=True)
    made = committer(link, heard, keep=1)
    for updates in (1, 2):
        save(link, made, updates)
    assert [step for step, _ in checkpoints_in(real)] == [2, 1]
    assert any(isinstance(event, Note) and str(real) in event.message for event in heard)


def test_a_rank_that_reports_what_no_other_saves_fills_no_memory(tmp_path: Path) -> None:
    heard: list[Event] = []
    made = committer(tmp_path, heard)
    for updates in range(100, 1100):
        assert made.record(ShardFailed(updates, 1, "x"))
    assert len(made._attempts) <= 8 and heard == []
    save(tmp_path, made, 2000)
    assert [step for step, _ in checkpoints_in(tmp_path)] == [2000]


def test_a_state_that_no_manifest_can_hold_costs_the_checkpoint(tmp_path: Path) -> None:
    heard: list[Event] = []
    made = committer(tmp_path, heard)
    made.record(shard(tmp_path, 3, 1))
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"": nested}
    made.record(msgspec.structs.replace(shard(tmp_path, 3, 0), state={"run": nested}))
    assert checkpoints_in(tmp_path) == [] and made.failure is not None
    while nested:
        nested = nested.pop("")  # as deep, Python could not free it either
