from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smolrun.checkpoints.tensor_slice import NAME_OF_DTYPE, TensorSlice
from smolrun.checkpoints.writer import partition_keys, write_shard
from smolrun.errors import CheckpointError


def whole(key: str, values: torch.Tensor) -> TensorSlice:
    return TensorSlice(key, tuple(values.shape), 0, values)


@pytest.mark.parametrize("dtype", NAME_OF_DTYPE, ids=str)
def test_safetensors_reads_what_we_write(tmp_path: Path, dtype: torch.dtype):
    values = torch.arange(-3, 7).view(2, 5).to(dtype)
    write_shard(tmp_path, 0, [whole("ключ/weight", values), whole("s", values[0, 0].clone())])
    found = load_file(tmp_path / "rank0-0.safetensors")
    assert set(found) == {"ключ/weight@0", "s@0"}
    assert found["ключ/weight@0"].dtype == dtype
    same = found["ключ/weight@0"].view(torch.uint8) == values.reshape(-1).view(torch.uint8)
    assert same.all()


def test_the_report_is_json_and_true(tmp_path: Path):
    report = write_shard(tmp_path, 3, [whole("a", torch.ones(4)), whole("b", torch.ones(2, 2))], 20)
    assert json.loads(json.dumps(report)) == report
    assert list(report["files"]) == ["rank3-0.safetensors", "rank3-1.safetensors"]
    for name, entry in report["files"].items():
        content = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    piece = {"file": "rank3-1.safetensors", "name": "b@0", "start": 0, "stop": 4}
    assert report["tensors"]["b"] == {"dtype": "F32", "shape": [2, 2], "pieces": [piece]}


def test_a_piece_too_large_for_a_file_is_cut(tmp_path: Path):
    base = torch.arange(100, dtype=torch.float32)
    piece = TensorSlice("w", (1000,), 500, base[10:35])  # lies in the middle of something larger
    report = write_shard(tmp_path, 0, [piece], max_file_bytes=40)
    ranges = [(piece["start"], piece["stop"]) for piece in report["tensors"]["w"]["pieces"]]
    assert ranges == [(500, 510), (510, 520), (520, 525)]
    found = [load_file(tmp_path / name) for name in report["files"]]
    assert [list(file) for file in found] == [["w@500"], ["w@510"], ["w@520"]]
    assert torch.cat([next(iter(file.values())) for file in found]).equal(base[10:35])


def test_tied_views_and_strided_tensors(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    tied = [whole("a", base), whole("b", base), whole("t", base.t()), whole("v", base[1])]
    parameter = torch.nn.Parameter(base.clone())
    write_shard(tmp_path, 0, [*tied, whole("p", parameter)])
    found = load_file(tmp_path / "rank0-0.safetensors")
    assert found["a@0"].equal(found["b@0"])
    assert found["t@0"].equal(base.t().reshape(-1))
    assert found["v@0"].equal(base[1])


def test_empty_pieces_are_told_and_not_written(tmp_path: Path):
    pieces = [TensorSlice("e", (0, 4), 0, torch.ones(0)), TensorSlice("f", (4,), 4, torch.ones(0))]
    report = write_shard(tmp_path / "new" / "folder", 0, pieces)
    assert report["files"] == {}
    assert report["tensors"]["e"] == {"dtype": "F32", "shape": [0, 4], "pieces": []}
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_no_more_than_one_files_tensors_are_held(tmp_path: Path):
    alive: set[int] = set()
    most = 0

    def made() -> Iterator[TensorSlice]:
        nonlocal most
        for i in range(20):
            values = torch.full((1000,), float(i))
            alive.add(i)
            weakref.finalize(values, alive.discard, i)
            most = max(most, len(alive))
            yield whole(f"w{i}", values)
            del values

    write_shard(tmp_path, 0, made(), max_file_bytes=8000)  # two tensors a file
    gc.collect()
    assert not alive
    assert most <= 4


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ([whole("a", torch.ones(3)), whole("a", torch.ones(3))], "given twice"),
        ([whole("a", torch.ones(3)), TensorSlice("a", (4,), 3, torch.ones(1))], "differ in dtype"),
        (
            [
                TensorSlice("a", (4,), 0, torch.ones(2)),
                TensorSlice("a", (4,), 2, torch.ones(2).half()),
            ],
            "differ",
        ),
    ],
)
def test_pieces_that_contradict_leave_no_file(
    tmp_path: Path, pieces: list[TensorSlice], problem: str
):
    with pytest.raises(CheckpointError, match=problem):
        write_shard(tmp_path, 0, pieces, max_file_bytes=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "shape", "start", "values", "problem"),
    [
        ("a", (4,), 2, torch.ones(3), "elements 2 to 5"),
        ("a", (4,), -1, torch.ones(3), "elements -1 to 2"),
        ("a", (-4, -1), 0, torch.ones(3), "do not lie in"),
        ("", (4,), 0, torch.ones(4), "needs a key"),
        ("a", (4,), 0, torch.ones(4, dtype=torch.complex128), "complex128 cannot be saved"),
    ],
)
def test_pieces_that_cannot_be(
    key: str, shape: tuple[int, ...], start: int, values: torch.Tensor, problem: str
):
    with pytest.raises(CheckpointError, match=problem):
        TensorSlice(key, shape, start, values)


def test_somebody_elses_file_is_neither_written_nor_removed(tmp_path: Path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "rank0-0.safetensors").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        write_shard(tmp_path, 0, [whole("a", torch.ones(4))])
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "rank0-0.safetensors").is_symlink()


def three_files() -> list[TensorSlice]:
    return [whole(f"w{i}", torch.ones(100_000)) for i in range(3)]


def test_a_limit_of_the_file_size_is_an_oserror(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_shard(tmp_path, 0, three_files(), 400_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if sys.platform != "linux" or os.getuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_oserror_and_gets_its_space_back(small_disk: Path):
    with pytest.raises(OSError) as caught:  # noqa: PT011  (the number below says which)
        write_shard(small_disk / "part", 0, three_files(), 400_000)
    assert caught.value.errno == errno.ENOSPC
    assert list((small_disk / "part").iterdir()) == []
    write_shard(small_disk / "part", 0, three_files()[:2], 400_000)


def test_a_disk_that_became_read_only_is_an_oserror(small_disk: Path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        write_shard(small_disk / "part", 0, three_files())
    assert caught.value.errno == errno.EROFS


def test_ranks_partition_what_all_of_them_hold() -> None:
    """Every replicated key is written once, by the rank with the fewest bytes so far."""
    shared = [TensorSlice.whole(f"model/{n}", torch.zeros(n)) for n in (5, 4, 3, 2, 1)]
    told = []
    for index in range(2):
        own = TensorSlice(f"own/{index}", (9,), 0, torch.zeros(9))
        other = TensorSlice.whole("model/9", torch.zeros(9), "other")
        told.append({s.key for s in partition_keys([*shared, own, other], 2, index)})
    assert told == [
        {"model/5", "model/2", "model/1", "own/0"},
        {"model/4", "model/3", "own/1"},
    ]
