"""The archive of a run's code: the same for the same files, small, and it runs where it lands."""

from __future__ import annotations

import fnmatch
import io
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from smolrun.errors import ConfigError
from smolrun.launch.delivery import code_archive as module
from smolrun.launch.delivery.code_archive import code_archive, own_modules, package_files


def test_the_same_files_give_the_same_bytes_and_any_edit_another_name(tmp_path: Path) -> None:
    code = tmp_path / "my_code.py"
    code.write_text("x = 1\n")
    one = code_archive(tmp_path, ["my_code:build"])
    os.utime(code, (0, 0))
    same = code_archive(tmp_path, ["my_code:build"])
    assert (one.digest, one.pack()) == (same.digest, same.pack())
    code.write_text("x = 2\n")
    assert code_archive(tmp_path, ["my_code:build"]).digest != one.digest
    code.rename(tmp_path / "my_coda.py")
    assert code_archive(tmp_path, ["my_coda:build"]).digest != one.digest
    assert one.own == ["my_code.py"]
    assert code_archive(tmp_path, []).own == []


def test_it_is_small_with_the_chat_page(tmp_path: Path) -> None:
    assert len(code_archive(tmp_path, []).pack()) < 1_500_000


def test_part_of_it_can_be_packed(tmp_path: Path) -> None:
    archive = code_archive(tmp_path, [])
    data = archive.pack(["lib/smolrun/errors.py"])
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        assert opened.namelist() == ["lib/smolrun/errors.py"]
        assert opened.read("lib/smolrun/errors.py") == archive.files["lib/smolrun/errors.py"]


def test_it_runs_from_where_it_lands_and_knows_its_version(tmp_path: Path) -> None:
    (tmp_path / "my_code.py").write_text("WORD = 'mine'\n")
    archive = code_archive(tmp_path, ["my_code:build"])
    there = tmp_path / "there"
    with zipfile.ZipFile(io.BytesIO(archive.pack())) as opened:
        opened.extractall(there)
    program = (
        "import os, sys; sys.path.append(os.getcwd())\n"
        "import smolrun.worker.process, my_code\n"
        "from importlib.metadata import distribution\n"
        "place = distribution('smolrun').locate_file('')\n"
        "print(smolrun.worker.process.__file__, place, my_code.WORD)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "PYTHONPATH": str(there / "lib")},
        cwd=there / "own",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    worker, place, word = done.stdout.split()
    assert Path(worker) == there / "lib" / "smolrun" / "worker" / "process.py"
    assert Path(place) == there / "lib"
    assert word == "mine"


ROOT = Path(__file__).resolve().parents[3]


def write(folder: Path, *names: str, **texts: str) -> Path:
    """Empty files by path, and files of the folder itself by name with their text."""
    for name, text in [
        *((name, "") for name in names),
        *((f"{k}.py", v) for k, v in texts.items()),
    ]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def taken(folder: Path, *targets: str) -> list[str]:
    return sorted(own_modules(folder, targets))


def test_our_package_is_all_there_as_it_would_be_installed() -> None:
    files = package_files()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = project["tool"]["setuptools"]["package-dir"]
    for package, folder in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT / folder).as_posix()
            assert f"{package.replace('.', '/')}/{name}" in files, path
    assert "smolrun/conf/config.yaml" in files
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        inner = package.removeprefix("smolrun").removeprefix(".")
        root = ROOT / folders[package] if package in folders else ROOT / "smolrun" / inner
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        found = [name for pattern in patterns for name in fnmatch.filter(names, pattern)]
        assert found, package
        for name in found:  # pages, styles and the like
            is_unread = name in ("py.typed", "page/source.sha256")
            assert is_unread or f"{package.replace('.', '/')}/{name}" in files, name
    assert not [name for name in files if name.startswith("smolrun/ui/web/")]
    assert not [name for name in files if "__pycache__" in name or not name.startswith("smolrun/")]


def test_nothing_is_taken_without_a_target_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, my_code="")
    assert taken(tmp_path) == []
    assert taken(tmp_path, "smolrun.models.mlp:build", "elsewhere:build") == []


def test_what_a_module_imports_comes_with_it_wherever_it_says_so(tmp_path: Path) -> None:
    write(
        tmp_path,
        "by_import/part.py",
        "my_lib/__init__.py",
        "my_lib/deep/down.py",
        "my_lib/other.py",
        "tests/test_my_code.py",
        my_code="import torch\nfrom my_net import Net\nimport my_lib.deep.down\n",
        my_net="def late():\n    import my_late\n    __import__('by_name')\n",
        my_late="import importlib\nimportlib.import_module('by_import.part')\n",
        by_name="import my_code",  # a circle
        unrelated="",
    )
    assert taken(tmp_path, "my_code:build") == [
        "by_import/part.py",
        "by_name.py",
        "my_code.py",
        "my_late.py",
        "my_lib/__init__.py",
        "my_lib/deep/down.py",
        "my_lib/other.py",
        "my_net.py",
    ]


def test_a_file_that_hides_a_library_stays_home(tmp_path: Path) -> None:
    """The user's folder comes last on the path of a worker, so nobody would ever import it."""
    write(tmp_path, "json.py", "numpy.py", "yaml/__init__.py", my_code="import json, numpy, yaml")
    assert taken(tmp_path, "my_code:build") == ["my_code.py"]


def test_a_target_that_python_finds_in_this_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "found_here.py", "pack_here/__init__.py", "spread_here/part.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["found_here:f", "pack_here:f", "spread_here.part:f"]
    assert taken(tmp_path, *names) == [
        "found_here.py",
        "pack_here/__init__.py",
        "spread_here/part.py",
    ]


def test_of_a_package_no_caches_hidden_folders_or_venvs_are_taken(tmp_path: Path) -> None:
    skipped = ["env/lib/torch.py", "node_modules/x.py", ".hidden/x.py", "__pycache__/x.py"]
    write(tmp_path / "mine", "__init__.py", "net.py", ".x.py", *skipped)
    (tmp_path / "mine" / "env" / "pyvenv.cfg").touch()
    (tmp_path / "mine" / "weights.bin").write_bytes(b"x" * 1000)
    assert taken(tmp_path, "mine:build") == ["mine/__init__.py", "mine/net.py"]


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "here", "mine/__init__.py")
    write(tmp_path / "shared", "layers.py")
    try:
        (folder / "mine" / "shared").symlink_to(tmp_path / "shared")
        (folder / "mine" / "again").symlink_to(folder / "mine")
    except OSError:
        pytest.skip("this system lets nobody make links")
    assert taken(folder, "mine:build") == ["mine/__init__.py", "mine/shared/layers.py"]


def test_code_that_cannot_be_read_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, broken="def f(:\n", nul="\0")
    assert taken(tmp_path, "broken:f", "nul:f") == ["broken.py", "nul.py"]


def test_too_much_is_refused_and_the_largest_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 10_000)
    write(tmp_path, my_code="import my_table", my_table="#" * 9_990)
    assert taken(tmp_path, "my_table:f") == ["my_table.py"]
    with pytest.raises(ConfigError, match=r"the largest file is my_table\.py"):
        taken(tmp_path, "my_code:f")
