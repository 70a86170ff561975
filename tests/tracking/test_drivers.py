"""Which drivers of this account live, and what each of them uses."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from smolrun.tracking.drivers import LivingDriver, living_drivers, note_driver
from tests.tracking.test_past_runs import a_run

ONE, OTHER = (f"20260203-142501-{name}-aaaa" for name in ("one", "other"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "smolrun" / "drivers"


def test_drivers_of_all_folders_are_found_until_they_end(tmp_path: Path, cache: Path) -> None:
    assert living_drivers() == []
    one, other = a_run(tmp_path / "a", ONE), a_run(tmp_path / "b", OTHER)
    for run in (one, other):
        run.write_driver(steps=0)
    note_driver(one, [tmp_path / "model"])
    note_driver(other)
    assert living_drivers() == [
        LivingDriver(str(one.path.resolve()), [str((tmp_path / "model").resolve())]),
        LivingDriver(str(other.path.resolve()), None),
    ]
    one.write_summary({"status": "stopped"})
    (cache / "damaged.json").write_text("{")
    assert [Path(driver.folder).name for driver in living_drivers()] == [OTHER]
    assert sorted(path.name for path in cache.iterdir()) == [f"{OTHER}.json", "damaged.json"]


def test_a_driver_needs_a_folder_in_which_a_file_of_it_is_and_what_is_in_its_own(
    tmp_path: Path,
) -> None:
    driver = LivingDriver("run", [str(tmp_path / "models" / "a" / "snapshot")])
    assert driver.needs(tmp_path / "models" / "a")
    assert driver.needs(tmp_path / "models" / "a" / "snapshot" / "x.safetensors")
    assert not driver.needs(tmp_path / "models" / "b")
    assert not driver.needs(tmp_path / "models" / "a" / "snap")


def test_a_run_begins_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "file" / name)
    run = a_run(tmp_path, ONE)
    run.write_driver(steps=0)
    note_driver(run)
    assert living_drivers() == []
