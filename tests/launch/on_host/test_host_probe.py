from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from smolrun.launch.on_host.host_probe import main


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [("~/a b", "{}/a b"), ("c/d", "{}/c/d"), ("c/../d", "{}/d"), ("{}/e", "{}/e")],
)
def test_the_folder_is_made_below_the_home(home: Path, workdir: str, expected: str):
    slashed = home.as_posix()
    said = main({"workdir": workdir.format(slashed)})
    assert said["workdir"] == expected.format(slashed)
    assert said["problem"] is None
    assert Path(said["workdir"]).is_dir()
    assert list(Path(said["workdir"]).iterdir()) == []


def test_what_it_says(home: Path):
    said = main({"workdir": "w"})
    assert said["os"] == platform.system().lower()
    assert said["executable"] == sys.executable.replace(os.sep, "/")
    assert 1 <= said["cores"] <= (os.cpu_count() or 1)


def test_a_folder_that_cannot_be(home: Path):
    (home / "file").write_text("")
    assert main({"workdir": "file"})["problem"]
    assert main({"workdir": "file/below"})["problem"]
