"""What a run has on a host while it lives, and that nothing of it stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.checkpoints.find import verify
from smolrun.checkpoints.folder import commit
from smolrun.checkpoints.manifest import merge
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard
from smolrun.errors import CheckpointError, HostError
from smolrun.launch.delivery.run_folder import (
    CheckpointFiles,
    clear_run,
    run_on_host,
)
from smolrun.launch.delivery.store import TransferProgress
from smolrun.launch.on_host import run_folder
from tests.launch.here import HereMachine


@pytest.fixture
def mini1(tmp_path: Path) -> Any:
    return HereMachine(tmp_path / "mini1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    part = tmp_path / "checkpoints" / "step-00000010.part-t"
    reports = [
        write_shard(part, rank, [TensorSlice("weight", (10,), 5 * rank, torch.arange(5.0))])
        for rank in (0, 1)
    ]
    facts: dict[str, Any] = {"run_id": "r", "config_hash": "c", "world_size": 2, "state": {}}
    return commit(part, merge(reports, step=10, **facts))


def test_a_checkpoint_verifies_on_the_host_until_the_run_ends(mini1: Any, checkpoint: Path) -> None:
    run = run_on_host(mini1, "run-1")
    there = CheckpointFiles(checkpoint).deliver(mini1, TransferProgress("checkpoint"), run)
    assert verify(Path(there)) == verify(checkpoint)
    assert Path(there).name == checkpoint.name
    assert clear_run(mini1, "run-1")
    assert not Path(run).exists()
    assert clear_run(mini1, "run-1"), "it may come twice"


def test_a_checkpoint_that_is_damaged_on_the_driver_goes_nowhere(
    mini1: Any, checkpoint: Path
) -> None:
    file = checkpoint / "rank1-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    files = CheckpointFiles(checkpoint)
    with pytest.raises(HostError, match=r"rank1-0\.safetensors arrived there with other bytes"):
        files.deliver(mini1, TransferProgress("checkpoint"), run_on_host(mini1, "run-1"))
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError):
        CheckpointFiles(checkpoint)


@pytest.mark.parametrize("run_id", ["", "..", "../x", "a/b", "a\\b", "x" * 201, "a b"])
def test_no_name_of_a_run_leads_elsewhere(mini1: Any, run_id: str) -> None:
    with pytest.raises(CheckpointError):
        clear_run(mini1, run_id)


def test_clearing_takes_a_link_and_not_what_it_points_to(mini1: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    run = Path(run_on_host(mini1, "run-1"))
    run.parent.mkdir(parents=True)
    try:
        run.symlink_to(outside)
    except OSError:
        pytest.skip("this system lets nobody make links")
    assert clear_run(mini1, "run-1")
    assert (outside / "keep").exists()
    run.mkdir()
    (run / "inside").symlink_to(outside)
    assert clear_run(mini1, "run-1")
    assert (outside / "keep").exists()
    assert not run.exists()


def test_the_folder_is_named_alike_on_every_system(mini1: Any) -> None:
    shutil.rmtree(mini1.workdir, ignore_errors=True)
    mini1.workdir = "C:/Users/me/smolrun"
    assert run_on_host(mini1, "2026-01-02-run") == "C:/Users/me/smolrun/runs/2026-01-02-run"


def test_clearing_is_tried_again_while_an_ending_worker_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def rmtree(folder: Path, **keys: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            folder.rmdir()

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(run_folder.shutil, "rmtree", rmtree)
    assert run_folder.clear({"folder": tmp_path / "run"}) == {"left": False}
    assert len(calls) == 2
