"""Small checkpoints for the tests: each says by its values which save it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from smolrun.checkpoints.folder import commit, part_folder
from smolrun.checkpoints.manifest import Manifest, hash_of, merge
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard

SHAPE = (5, 3)


def pieces_of(tag: int, rank: int) -> list[TensorSlice]:
    """Two ranks share a tensor; rank 0 has a second one, of another type."""
    whole = torch.full(SHAPE, float(tag))
    if rank == 1:
        return [TensorSlice("model/weight", SHAPE, 7, whole.view(-1)[7:])]
    return [
        TensorSlice("model/weight", SHAPE, 0, whole.view(-1)[:7]),
        TensorSlice("optimizer/exp_avg/weight", SHAPE, 0, whole.bfloat16()),
    ]


def manifest_of(part: Path, step: int, tag: int) -> Manifest:
    reports = [write_shard(part, rank, pieces_of(tag, rank), 40) for rank in range(2)]
    return merge(
        reports, step=step, run_id="a-run", config_hash="c0ffee", world_size=2, state={"tag": tag}
    )


def save(checkpoints: Path, step: int, tag: int | None = None, token: str = "t") -> Path:
    """A checkpoint whose every value is `tag` (the step if not given), in four files."""
    tag = step if tag is None else tag
    part = part_folder(checkpoints, step, f"{token}{tag}")
    return commit(part, manifest_of(part, step, tag))


def tag_of(folder: Path) -> int:
    """Which save a checkpoint came from; fails if it is a mix of several."""
    with CheckpointReader(folder) as checkpoint:
        tags = {int(checkpoint.manifest.state["tag"])}
        for key in checkpoint.keys():  # noqa: SIM118  (a method of ours, not of a dict)
            tags |= {int(value) for value in checkpoint.read(key).view(-1).tolist()}
    assert len(tags) == 1, f"a mix of the saves {tags}"
    return tags.pop()


def sealed(manifest: dict[str, Any]) -> bytes:
    """A changed manifest with its own hash made true again."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return json.dumps({**content, "sha256": hash_of(content)}).encode()
