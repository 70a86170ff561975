"""Sizes, names, banned code and stale file names over the whole repository; the packages that are
shipped. The limits and what they count are in rules.py, what may break them in exceptions.py."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.project import exceptions, rules
from tests.project.as_installed import lay_out

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("smolrun", "tasks", "conf", "tests", "docs")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def python_files(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.py"))]
    assert len(files) >= len(folders)
    return files


def test_files_have_a_readable_size():
    files = python_files("smolrun", "tasks")
    assert rules.file_sizes(files, least=rules.MIN_LINES, exceptions=exceptions.FILES) == []
    assert rules.file_sizes(python_files("tests"), least=0, exceptions={}) == []


def test_functions_are_short():
    files = python_files("smolrun", "tasks", "tests")
    assert rules.long_functions(files, exceptions.FUNCTIONS) == []


def test_a_class_name_stands_for_one_class():
    assert rules.same_class_names(python_files("smolrun", "tasks"), exceptions.CLASSES) == []


def test_names_of_files_say_what_is_in_them():
    files = [path for folder in FOLDERS for path in Path(folder).rglob("*.*")]
    files = [path for path in files if "node_modules" not in path.parts]
    assert rules.vague_names(files) == []


def test_nothing_can_run_code_from_data():
    assert rules.unsafe_code(python_files("smolrun", "tasks")) == []


def test_files_that_are_named_exist():
    files = [*python_files("smolrun", "tasks"), *sorted(Path("docs").rglob("*.md"))]
    files += [*sorted(Path("conf").rglob("*.yaml")), *Path().glob("*.md")]
    known = python_files(*FOLDERS)
    assert rules.stale_paths(files, known, exceptions.PATHS) == []


def test_every_package_is_shipped():
    project = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in Path("smolrun").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert set(project["packages"]) == packages | {"smolrun.tasks", "smolrun.conf"}


def test_the_tree_that_is_checked_has_tasks_and_conf(tmp_path: Path):
    lay_out(ROOT, tmp_path)
    assert (tmp_path / "smolrun" / "tasks" / "__init__.py").is_file()
    assert (tmp_path / "smolrun" / "conf" / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("x = 1\n" * 501, "has 501 lines"),
        ("x = 1\n" * 39, "has 39 lines"),
        ("class A:\n    async def f(self):\n" + "        x = 1\n" * 50, "::f has 51 lines"),
        ("import pickle", "import pickle"),
        ("import torch; torch.load('x')", "torch.load"),
        ("from cloudpickle import dumps", "import dumps"),
        ("# see gone/ring.py", "gone/ring.py"),
    ],
)
def test_violations_are_found(tmp_path: Path, text: str, violation: str):
    file = tmp_path / "bad.py"
    file.write_text(text)
    found = rules.file_sizes([file], least=rules.MIN_LINES, exceptions={})
    found += rules.long_functions([file], {}) + rules.unsafe_code([file])
    found += rules.stale_paths([file], [Path("collectives/ring.py")], set())
    assert any(violation in line for line in found)
    name = file.as_posix()
    assert rules.file_sizes([file], least=0, exceptions={name: ""})[-1] == f"{name}: no reason"


def test_text_about_unsafe_code_is_not_code(tmp_path: Path):
    file = tmp_path / "good.py"
    file.write_text(
        '"""Never pickle."""\nimport yaml  # not yaml.load\nyaml.safe_load("torch.load(x)")\n'
    )
    assert rules.unsafe_code([file]) == []
    assert rules.vague_names([Path("smolrun/buckets.py"), Path("conf/task/train.yaml")]) == []
    assert len(rules.vague_names([Path("mesh_utils.py"), Path("helpers/x.py")])) == 2
