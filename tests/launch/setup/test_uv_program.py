"""Which wheel of uv a host needs, and the program in it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import platformdirs
import pytest

from smolrun.errors import HostError
from smolrun.launch.setup.blank_host import UV_VERSION, Blank
from smolrun.launch.setup.uv_program import fetch_uv, program_of, wheel_of


@pytest.mark.parametrize(
    ("found", "platform"),
    [
        (Blank(system="linux", architecture="x86_64", libc="glibc 2.36"), "manylinux_2_17_x86_64"),
        (Blank(system="linux", architecture="x86_64", libc="musl"), "musllinux_1_1_x86_64"),
        (Blank(system="linux", architecture="aarch64"), "manylinux_2_17_aarch64"),
        (Blank(system="linux", architecture="arm64", libc="musl"), "manylinux_2_17_aarch64"),
        (Blank(system="darwin", architecture="arm64"), "macosx_11_0_arm64"),
        (Blank(system="darwin", architecture="x86_64"), "macosx_10_12_x86_64"),
    ],
)
def test_every_system_has_a_pinned_wheel(found: Blank, platform: str):
    package = wheel_of("pi5", found)
    assert package.platform == platform and platform in package.file
    assert package.version == UV_VERSION and len(package.sha256) == 64


def test_a_system_without_a_pinned_wheel_is_refused():
    with pytest.raises(HostError, match="no uv is pinned") as refusal:
        wheel_of("pi5", Blank(system="linux", architecture="riscv64"))
    assert refusal.value.host == "pi5"


def test_another_wheel_of_that_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = Blank(system="linux", architecture="x86_64", libc="glibc 2.36")
    with zipfile.ZipFile(tmp_path / wheel_of("pi5", found).file, "w") as archive:
        info = f"uv-{UV_VERSION}.dist-info"
        archive.writestr(f"uv-{UV_VERSION}.data/scripts/uv", b"program")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: uv\nVersion: {UV_VERSION}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    with pytest.raises(HostError, match="DO NOT MATCH") as refusal:
        fetch_uv("pi5", found)
    assert refusal.value.host == "pi5"
    assert not list((tmp_path / "cache" / "data" / "packages").iterdir())


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
