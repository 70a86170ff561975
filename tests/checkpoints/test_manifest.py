from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from smolrun.checkpoints.folder import part_folder
from smolrun.checkpoints.manifest import MAX_MANIFEST_BYTES, Manifest, merge
from smolrun.checkpoints.writer import write_shard
from smolrun.errors import CheckpointError
from tests.checkpoints.saves import manifest_of, pieces_of, sealed

KEY = "model/weight"


@pytest.fixture
def content(tmp_path: Path) -> Any:
    manifest = manifest_of(part_folder(tmp_path, 3, "t"), 3, 3)
    return json.loads(manifest.to_bytes())


def read(content: Any) -> Manifest:
    return Manifest.from_bytes(sealed(content), "M")


def test_comes_back_as_it_was(content: Any):
    manifest = read(content)
    assert (manifest.step, manifest.run_id, manifest.world_size) == (3, "a-run", 2)
    assert manifest.state == {"tag": 3}
    assert manifest.num_bytes == sum(entry.bytes for entry in manifest.files.values()) > 0
    assert Manifest.from_bytes(manifest.to_bytes(), "M") == manifest


def rename_file(content: Any, new: str) -> None:
    old = content["tensors"][KEY]["pieces"][0]["file"]
    content["files"][new] = content["files"].pop(old)
    for tensor in content["tensors"].values():
        for piece in tensor["pieces"]:
            piece["file"] = new if piece["file"] == old else piece["file"]


@pytest.mark.parametrize(
    "name",
    [
        "../rank0-0.safetensors",
        "/etc/passwd",
        "a/rank0-0.safetensors",
        "..",
        "",
        "rank0-0.safetensors/../../x",
        "..\\rank0-0.safetensors",
        "C:rank0-0.safetensors",
        "rank0-0.safetensors\n",
        "rank٣-0.safetensors",
        "manifest.json",
    ],
)
def test_no_file_name_leads_elsewhere(content: Any, name: str):
    rename_file(content, name)
    with pytest.raises(CheckpointError, match="is not the name of a checkpoint file"):
        read(content)


def test_another_plain_name_is_fine(content: Any):
    rename_file(content, "rank7-0.safetensors")  # what the test above changes is only the name
    read(content)


def first(content: Any) -> Any:
    return content["tensors"][KEY]["pieces"][0]


BREAKS: dict[str, Any] = {
    "do not fit together": lambda c: first(c).update(start=1),
    "do not fit together: after": lambda c: first(c).update(stop=first(c)["stop"] + 1),
    "hold 0 elements": lambda c: c["tensors"][KEY].update(pieces=[]),
    "hold 15 elements": lambda c: c["tensors"][KEY].update(shape=[10**6, 10**6]),
    "its shape .5, 4. has 20": lambda c: c["tensors"][KEY].update(shape=[5, 4]),
    "is impossible": lambda c: c["tensors"][KEY].update(shape=[-5, -3]),
    "impossible": lambda c: c["tensors"][KEY].update(shape=[1] * 9),
    "dtype 'F31' is not known": lambda c: c["tensors"][KEY].update(dtype="F31"),
    "its tensors need": lambda c: c["files"][first(c)["file"]].update(bytes=27),
    "a file not listed": lambda c: c["files"].pop(first(c)["file"]),
    "impossible size or hash": lambda c: c["files"][first(c)["file"]].update(bytes=-1),
    "impossible size": lambda c: c["files"][first(c)["file"]].update(sha256="x" * 64),
    "is used twice": lambda c: c["tensors"].update(twin=copy.deepcopy(c["tensors"][KEY])),
    "a key has 1 to": lambda c: c["tensors"].update({"": c["tensors"].pop(KEY)}),
    "a key has 1": lambda c: c["tensors"].update({"k" * 1001: c["tensors"].pop(KEY)}),
    "cannot be": lambda c: c.update(step=-1),
    "of 0 ranks": lambda c: c.update(world_size=0),
    "Expected `int`": lambda c: c.update(step="3"),
    "Expected `int`, got `float`": lambda c: c["tensors"][KEY].update(shape=[1.5]),
    "missing required field `state`": lambda c: c.pop("state"),
    "unknown field `code`": lambda c: c.update(code="import os"),
    "format version 2": lambda c: c.update(version=2),
    "no manifest of a smolrun checkpoint": lambda c: c.update(format="zip"),
}


@pytest.mark.parametrize("problem", BREAKS)
def test_what_cannot_be_true_is_named(content: Any, problem: str):
    BREAKS[problem](content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read(content)
    assert str(caught.value).startswith("M: ")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b"1" * 5000]
)
def test_what_is_no_manifest_is_told(data: bytes):
    with pytest.raises(CheckpointError, match=r"^M: no "):
        Manifest.from_bytes(data, "M")


def test_an_endless_manifest_is_not_parsed():
    with pytest.raises(CheckpointError, match="more than a manifest"):
        Manifest.from_bytes(b" " * (MAX_MANIFEST_BYTES + 1), "M")


def merged(reports: list[dict[str, Any]]) -> Manifest:
    return merge(reports, step=1, run_id="r", config_hash="c", world_size=2, state={})


@pytest.fixture
def reports(tmp_path: Path) -> list[dict[str, Any]]:
    made = [write_shard(tmp_path / "p", rank, pieces_of(1, rank)) for rank in range(2)]
    return json.loads(json.dumps(made))  # they travel as JSON


def test_reports_in_any_order_make_one_manifest(reports: list[dict[str, Any]]):
    one, other = merged(reports), merged(reports[::-1])
    assert one.tensors == other.tensors
    assert [piece.start for piece in one.tensors[KEY].pieces] == [0, 7]


def test_a_missing_report_is_a_missing_range(reports: list[dict[str, Any]]):
    with pytest.raises(CheckpointError, match="hold 7 elements"):
        merged(reports[:1])


def test_a_report_that_came_twice_is_told(reports: list[dict[str, Any]]):
    with pytest.raises(CheckpointError, match="rank 1 came twice"):
        merged([*reports, reports[1]])


def test_two_ranks_that_hold_the_same_elements_are_told(reports: list[dict[str, Any]]):
    reports[1]["tensors"][KEY]["pieces"][0]["start"] = 6
    with pytest.raises(CheckpointError, match="do not fit together"):
        merged(reports)


def test_ranks_that_disagree_about_a_tensor_are_told(reports: list[dict[str, Any]]):
    reports[1]["tensors"][KEY]["dtype"] = "F16"
    with pytest.raises(CheckpointError, match="another rank says F32"):
        merged(reports)


def test_a_rank_cannot_speak_of_another_ones_files(reports: list[dict[str, Any]]):
    reports[1]["files"] = reports[0]["files"]
    with pytest.raises(CheckpointError, match="is not a file of rank 1"):
        merged(reports)


@pytest.mark.parametrize("report", [{}, {"rank": "0"}, {"rank": 0, "files": [], "tensors": {}}])
def test_a_damaged_report_is_told(report: dict[str, Any]):
    with pytest.raises(CheckpointError, match="report of a rank"):
        merged([report])


def test_one_changed_digit_of_the_state_is_seen(content: Any):
    content["state"] = {"tag": 4}
    with pytest.raises(CheckpointError, match="changed after it was written"):
        Manifest.from_bytes(json.dumps(content).encode(), "M")
