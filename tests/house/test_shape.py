"""Sizes, names and banned code over the whole repository; and that each rule sees a violation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import excused, rules

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("smolrun", "tasks", "conf", "tests", "docs")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def python_files(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.py"))]
    assert len(files) >= len(folders)
    return files


def test_files_are_short():
    assert rules.long_files(python_files("smolrun", "tasks", "tests"), excused.FILES) == []


def test_functions_are_short():
    assert rules.long_functions(python_files("smolrun", "tasks", "tests"), excused.FUNCTIONS) == []


def test_names_say_what_lives_there():
    files = [path for folder in FOLDERS for path in Path(folder).rglob("*.*")]
    assert rules.vague_names(files) == []


def test_nothing_can_run_code_from_data():
    assert rules.unsafe_code(python_files("smolrun", "tasks")) == []


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_long_files_are_seen(tmp_path: Path):
    file = write(tmp_path, "long.py", "x = 1\n" * 501)
    assert rules.long_files([file], {}) == [f"{file.as_posix()} is 501 lines"]
    assert rules.long_files([file], {file.as_posix(): "a table"}) == []
    assert "without a reason" in rules.long_files([file], {file.as_posix(): ""})[0]
    file.write_text("x = 1\n" * 500)
    assert rules.long_files([file], {}) == []
    assert "no longer" in rules.long_files([file], {file.as_posix(): "a table"})[0]


def test_long_functions_are_seen(tmp_path: Path):
    file = write(tmp_path, "f.py", "class A:\n    async def f(self):\n" + "        x = 1\n" * 50)
    assert rules.long_functions([file], {}) == [f"{file.as_posix()}::f is 51 lines long"]
    file.write_text("def f():\n" + "    x = 1\n" * 49)
    assert rules.long_functions([file], {}) == []


@pytest.mark.parametrize("name", ["utils.py", "mesh_utils.py", "helpers/x.py", "Manager.py"])
def test_vague_names_are_seen(name: str):
    assert rules.vague_names([Path(name)])
    assert rules.vague_names([Path("smolrun/buckets.py"), Path("conf/task/train.yaml")]) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "import torch; torch.load('x')",
        "import yaml; yaml.load(text)",
        "from cloudpickle import dumps",
    ],
)
def test_unsafe_code_is_seen(tmp_path: Path, line: str):
    assert rules.unsafe_code([write(tmp_path, "bad.py", line)])


def test_words_about_unsafe_code_are_no_code(tmp_path: Path):
    text = '"""Never pickle."""\nimport yaml  # not yaml.load\nyaml.safe_load("a: torch.load(x)")\n'
    assert rules.unsafe_code([write(tmp_path, "good.py", text)]) == []
