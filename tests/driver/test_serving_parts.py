"""The layers of a served model on the driver: made once, and kept for the models served last."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.cli.compose import compose
from smolrun.driver import serving_parts
from smolrun.driver.serving_parts import (
    PartsDelivery,
    layers_file,
    needed_parts,
    parts_of,
    read_layers,
    write_layers,
)
from smolrun.errors import HostError
from smolrun.estimate.serving_plan import ServingPlan
from smolrun.serving.source import ModelSource, load_stage, source_of_folder
from tests.launch.here import HereMachine
from tests.serving.references import save_model


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "parts"
    place.mkdir()
    monkeypatch.setattr(serving_parts, "cache_folder", lambda name: place)
    monkeypatch.setattr(serving_parts.platformdirs, "user_cache_path", lambda name: tmp_path)
    return place


def source_in(folder: Path, width: int) -> ModelSource:
    save_model(folder, "smollm", intermediate_size=width)
    return source_of_folder(folder, folder.name)


def folders_of(source: ModelSource, root: Path) -> list[bool]:
    return [(root / key / name).is_file() for name, key in source.parts.items()]


def unused(*_: object) -> None:
    pass


def test_parts_are_made_once_and_kept_for_the_models_served_last(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_parts, "_KEPT_MODELS", 2)
    sources = [source_in(tmp_path / f"model{width}", width) for width in (32, 48, 64, 80)]
    made = [parts_of(source, "float32", unused) for source in sources[:3]]
    assert needed_parts(made[0], range(3, 4))[0] in made[0].parts
    assert all(all(folders_of(one, root)) for one in made), "they may be in the making"
    long_ago_s = time.time() - 2 * serving_parts._YOUNG_S
    for folder in root.iterdir():
        if folder.is_dir():
            os.utime(folder, (long_ago_s, long_ago_s))
    monkeypatch.setattr(serving_parts, "_make", lambda *_: pytest.fail("it is there"))
    assert parts_of(sources[1], "float32", unused) == made[1]  # used now
    assert not any(folders_of(made[0], root))
    monkeypatch.undo()
    assert all(folders_of(made[1], root)) and all(folders_of(made[2], root))
    assert len(list(root.glob("*.json"))) == 2


def test_a_model_whose_parts_are_gone_is_cut_again(tmp_path: Path, root: Path) -> None:
    source = source_in(tmp_path / "model", 32)
    made = parts_of(source, "bf16", unused)
    name, key = next(iter(made.parts.items()))
    (root / key / name).unlink()
    assert parts_of(source, "bf16", unused) == made
    assert all(folders_of(made, root))


def test_layers_are_kept_for_a_model_and_its_hosts(tmp_path: Path, root: Path) -> None:
    source = source_in(tmp_path / "model", 24)
    file = layers_file(source, "float32", ["a", "b"])
    assert read_layers(file) is None
    layers = [range(2), range(2, 3)]
    write_layers(file, layers)
    assert read_layers(file) == layers
    assert layers_file(source, "float32", ["a", "c"]) != file
    assert layers_file(source, "bf16", ["a", "b"]) != file
    file.write_text("[[0]]")
    assert read_layers(file) is None


def test_parts_in_int4_hold_the_codes_that_a_stage_takes(tmp_path: Path, root: Path) -> None:
    """A host quantizes nothing, and gets as few bytes as it keeps."""
    source = source_in(tmp_path / "model", 64)
    parts = parts_of(source, "int4", unused)
    assert parts.parts != parts_of(source, "int8", unused).parts
    stage = (1, 3, False, True)
    expected, found = (load_stage(one, *stage, "int4") for one in (source, parts))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    sent = [root / parts.parts[name] / name for name in needed_parts(parts, range(1, 4))]
    held = sum(tensor.nbytes for tensor in found.values())
    assert sum(path.stat().st_size for path in sent) < held + 3000 * len(sent)  # and headers


def test_hosts_without_room_for_copies_are_named_and_the_others_get_theirs(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each; the server goes on."""
    source = source_in(tmp_path / "model", 32)
    names = ["mini1", "mini2", "mini3"]
    machines = {name: HereMachine(tmp_path / name, name) for name in names}
    for name in names[1:]:

        def full(script: str, request: dict[str, Any], name: str = name) -> None:
            raise HostError(name, "0.2 GB do not fit on its disk", "make room there")

        machines[name].before_call = full
    hosts = ",".join(f"{{name:{name},ssh:{name}}}" for name in names)
    said: list[str] = []
    delivery = PartsDelivery(
        compose(["task=serve", "serving=pipeline", f"cluster.hosts=[{hosts}]"]),
        source,
        machines,  # type: ignore[arg-type]
        "r1",
        is_busy=lambda: False,
        say=said.append,
        progress=unused,
    )
    plan = ServingPlan([range(1), range(1, 2), range(2, 4)], 1, 16, 1.0)
    delivery.copy([plan], "float32", 0.0, lambda: True)
    made = parts_of(source, "float32", unused)
    for part in needed_parts(made, range(1)):
        assert Path(machines["mini1"].workdir, "files", made.parts[part], part).is_file()
    assert said == [
        f"warning: no copies of other hosts' layers: {name}: 0.2 GB do not fit on its disk; make "
        "room there"
        for name in names[1:]
    ]
