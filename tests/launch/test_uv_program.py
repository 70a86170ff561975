"""Which wheel of uv a host needs, and the program in it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from smolrun.errors import HostError
from smolrun.launch.blank_host import Blank
from smolrun.launch.uv_program import platforms, program_of


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (Blank(system="linux", architecture="x86_64", libc="glibc 2.36"), "manylinux_2_17_x86_64"),
        (Blank(system="linux", architecture="aarch64"), "manylinux_2_28_aarch64"),
        (Blank(system="linux", architecture="aarch64", libc="musl"), "musllinux_1_1_aarch64"),
        (Blank(system="darwin", architecture="arm64"), "macosx_11_0_arm64"),
        (Blank(system="darwin", architecture="x86_64"), "macosx_10_12_x86_64"),
    ],
)
def test_every_system_has_its_wheels(found: Blank, name: str):
    assert name in platforms(found)


def test_the_program_is_taken_out_of_the_wheel(tmp_path: Path):
    wheel = tmp_path / "uv-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("uv/__init__.py", "")
        archive.writestr("uv-1.0.data/scripts/uvx", b"other")
        archive.writestr("uv-1.0.data/scripts/uv", b"program")
    assert program_of("pi5", wheel) == b"program"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("uv/__init__.py", "")
    with pytest.raises(HostError, match="no program"):
        program_of("pi5", wheel)
