from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from smolrun.checkpoints.folder import commit, part_folder
from smolrun.checkpoints.manifest import merge
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard
from smolrun.errors import CheckpointError
from tests.checkpoints.saves import save

TENSORS = {
    "model/w": torch.randn(13, 7),
    "model/b": torch.randn(11).bfloat16(),
    "model/scalar": torch.tensor(7, dtype=torch.int64),
    "model/empty": torch.zeros(0, 3),
    "mask": torch.rand(50) > 0.5,
}


def saved_by(folder: Path, world_size: int, seed: int) -> Path:
    """TENSORS, each cut among the ranks at random places; some ranks hold nothing of some."""
    dice = random.Random(seed)
    pieces: list[list[TensorSlice]] = [[] for _ in range(world_size)]
    for key, tensor in TENSORS.items():
        cuts = sorted(dice.randint(0, tensor.numel()) for _ in range(world_size - 1))
        ends = [0, *cuts, tensor.numel()]
        order = dice.sample(range(world_size), world_size)
        for rank, start, stop in zip(order, ends[:-1], ends[1:], strict=True):
            values = tensor.reshape(-1)[start:stop]
            pieces[rank].append(TensorSlice(key, tuple(tensor.shape), start, values))
    part = part_folder(folder, 1, "t")
    reports = [write_shard(part, rank, pieces[rank], 64) for rank in range(world_size)]
    manifest = merge(reports, step=1, run_id="r", config_hash="c", world_size=world_size, state={})
    return commit(part, manifest)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_whoever_wrote_it_reads_the_same(tmp_path: Path, world_size: int):
    dice = random.Random(world_size)
    with CheckpointReader(saved_by(tmp_path, world_size, seed=world_size)) as checkpoint:
        assert checkpoint.keys() == sorted(TENSORS)
        assert checkpoint.keys("model/") == sorted(set(TENSORS) - {"mask"})
        for key, tensor in TENSORS.items():
            assert checkpoint.shape(key) == tuple(tensor.shape)
            assert checkpoint.dtype(key) == tensor.dtype
            assert checkpoint.read(key).equal(tensor)
            for _ in range(20):
                ends = sorted(dice.randint(0, math.prod(tensor.shape)) for _ in range(2))
                found = checkpoint.read(key, *ends)
                assert found.equal(tensor.reshape(-1)[slice(*ends)])
                assert found.dim() == 1


def test_what_is_read_is_the_readers_own(tmp_path: Path):
    folder = save(tmp_path, 1)
    with CheckpointReader(folder) as checkpoint:
        checkpoint.read("model/weight").zero_()
        assert (checkpoint.read("model/weight") == 1).all()
        kept = checkpoint.read("model/weight")
    for file in folder.iterdir():
        file.unlink()
    assert (kept == 1).all()


@pytest.mark.parametrize("ends", [(-1, 3), (3, 2), (0, 16), (16, 16)])
def test_ranges_outside_the_tensor_are_told(tmp_path: Path, ends: tuple[int, int]):
    checkpoint = CheckpointReader(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="has 15 elements, not the range"):
        checkpoint.read("model/weight", *ends)


def test_a_key_that_is_not_there_is_told(tmp_path: Path):
    checkpoint = CheckpointReader(save(tmp_path, 1))
    for ask in (checkpoint.read, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(CheckpointError, match="has no 'model/wieght'"):
            ask("model/wieght")


def test_a_file_that_is_gone_is_told_when_it_is_read(tmp_path: Path):
    folder = save(tmp_path, 1)
    checkpoint = CheckpointReader(folder)
    (folder / "rank1-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank1-0\.safetensors cannot be read"):
        checkpoint.read("model/weight")


def test_closing_lets_go_and_reading_opens_again(tmp_path: Path):
    checkpoint = CheckpointReader(save(tmp_path, 1))
    checkpoint.read("model/weight")
    checkpoint.close()
    assert (checkpoint.read("model/weight") == 1).all()


def test_load_fills_slices_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    written = [
        TensorSlice("model/a", (2, 3), 0, torch.arange(6.0).view(2, 3)),
        TensorSlice("model/b", (), 0, torch.tensor(7, dtype=torch.int64)),
    ]
    part = part_folder(tmp_path, 1, "t")
    reports = [write_shard(part, 0, written)]
    manifest = merge(reports, step=1, run_id="r", config_hash="c", world_size=1, state={})
    with CheckpointReader(commit(part, manifest)) as checkpoint:
        middle, scalar = torch.zeros(1, 3), torch.zeros((), dtype=torch.int64)
        mine = [
            TensorSlice("model/a", (2, 3), 2, middle),
            TensorSlice.whole("model/b", scalar),
            TensorSlice("model/b", (), 0, torch.empty(0, dtype=torch.int64), "other"),
        ]
        checkpoint.load(mine, all_of="model/")
        assert middle.tolist() == [[2.0, 3.0, 4.0]] and scalar == 7
        with pytest.raises(CheckpointError, match="another model: it has model/b"):
            checkpoint.load(mine[:1], all_of="model/")
        for wrong in (
            TensorSlice.whole("model/c", middle),
            TensorSlice.whole("model/a", middle),
            TensorSlice("model/a", (2, 3), 0, middle.double()),
        ):
            with pytest.raises(CheckpointError, match=f"another model: .*{wrong.key}"):
                checkpoint.load([wrong])
