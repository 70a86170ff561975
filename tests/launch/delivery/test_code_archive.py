"""The archive of a run's code: the same for the same files, small, and it runs where it lands."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from smolrun.launch.delivery.code_archive import code_archive


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


def test_it_is_less_than_a_megabyte(tmp_path: Path) -> None:
    assert len(code_archive(tmp_path, []).pack()) < 1_000_000


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
    assert Path(worker) == there / "lib" / "smolrun" / "cli" / "worker.py"
    assert Path(place) == there / "lib"
    assert word == "mine"
