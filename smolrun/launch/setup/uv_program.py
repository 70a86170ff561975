"""The program uv for another machine: fetched by this machine's pip, as the host may have no way.

Version and hash of each system's wheel are pinned. A Python that uv then fetches is checked by the
hashes that are part of the program.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import platformdirs

from smolrun.data.fetch import Package, fetched
from smolrun.errors import DataError, HostError
from smolrun.launch.setup.blank_host import UV_VERSION, Blank

_MOST_BYTES = 200_000_000
# (system, architecture, libc): platform tags in the wheel's name, sha256. Only systems that
# task=setup does not refuse; the wheel of aarch64 is static, for glibc and musl alike.
_WHEELS = {
    ("linux", "x86_64", "glibc"): (
        "manylinux_2_17_x86_64.manylinux2014_x86_64",
        "d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19",
    ),
    ("linux", "x86_64", "musl"): (
        "musllinux_1_1_x86_64",
        "2c45530751517d6c3bbc69a19473f6effe47cce047bede01ffd8af7ea7b36b25",
    ),
    ("linux", "aarch64", ""): (
        "manylinux_2_17_aarch64.manylinux2014_aarch64.musllinux_1_1_aarch64",
        "5435c5ce14a56431208ca0996416d310f1598e8c2c8ba707688985a16bb82dbe",
    ),
    ("darwin", "arm64", ""): (
        "macosx_11_0_arm64",
        "66c512266d633bef48384a1f53003f41f2a8e7b36fe6e7fbfd3e0fd52d96fa63",
    ),
    ("darwin", "x86_64", ""): (
        "macosx_10_12_x86_64",
        "c16ed11e013557536b3e60065f1b912f6407bd6518e041b961e23ef9e6b4fbf5",
    ),
}


def wheel_of(host: str, found: Blank) -> Package:
    """The wheel for that system; HostError where none is pinned."""
    machine = found.architecture
    if found.system == "linux" and machine == "arm64":
        machine = "aarch64"
    libc = "musl" if found.libc == "musl" else "glibc"
    key = (found.system, machine, libc)
    pinned = _WHEELS.get(key) or _WHEELS.get((*key[:2], ""))
    if pinned is None:
        raise HostError(
            host,
            f"no uv is pinned for {found.system} on {machine}",
            "install Python 3.12 with pip there, or uv itself",
        )
    tags, sha256 = pinned
    return Package(
        client="pip",
        name="uv",
        version=UV_VERSION,
        file=f"uv-{UV_VERSION}-py3-none-{tags}.whl",
        sha256=sha256,
        megabytes=18,
        platform=tags.partition(".")[0],
        otherwise="look at this machine's network, or install uv on the host",
    )


def fetch_uv(host: str, found: Blank) -> bytes:
    """The program for that system; HostError where this machine cannot get it."""
    package = wheel_of(host, found)
    try:
        cache = platformdirs.user_cache_path("smolrun") / "data"  # beside packages of data sets
        wheel = fetched(cache, package, lambda *_: None)
    except DataError as error:
        raise HostError(host, str(error)) from None
    return program_of(host, wheel)


def program_of(host: str, wheel: Path) -> bytes:
    """The program in a wheel of uv."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.filename.endswith("/scripts/uv") and info.file_size <= _MOST_BYTES:
                return archive.read(info)
    raise HostError(host, f"{wheel.name} has no program in it")
