"""The program uv for another machine: fetched by this machine's pip, as the host may have no way.

pip checks what it fetches, and its own settings (mirror, proxy) hold.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from smolrun.errors import HostError
from smolrun.launch.blank_host import Blank

_FETCH_S = 300.0
_MOST_BYTES = 200_000_000


def platforms(found: Blank) -> list[str]:
    """The names that wheels have for such a system, as pip wants them."""
    arch = found.architecture
    if found.system == "darwin":
        return ["macosx_11_0_arm64"] if arch == "arm64" else ["macosx_10_12_x86_64"]
    machine = "aarch64" if arch in ("arm64", "aarch64") else arch
    if found.libc == "musl":
        return [f"musllinux_1_1_{machine}", f"musllinux_1_2_{machine}"]
    return [f"manylinux_2_28_{machine}", f"manylinux_2_17_{machine}", f"manylinux2014_{machine}"]


def fetch_uv(host: str, found: Blank) -> bytes:
    """The program for that system; HostError where this machine cannot get it."""
    with tempfile.TemporaryDirectory(prefix="smolrun-uv-") as place:
        choice = [word for name in platforms(found) for word in ("--platform", name)]
        command = [sys.executable, "-m", "pip", "download", "uv", "--no-deps", "--quiet"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", *choice, "--dest", place]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_FETCH_S,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise HostError(host, f"pip cannot fetch uv for it: {error}") from error
        wheels = list(Path(place).glob("uv-*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no wheel"]
            raise HostError(host, f"pip cannot fetch uv for it: {said[0]}")
        return program_of(host, wheels[0])


def program_of(host: str, wheel: Path) -> bytes:
    """The program in a wheel of uv."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.filename.endswith("/scripts/uv") and info.file_size <= _MOST_BYTES:
                return archive.read(info)
    raise HostError(host, f"{wheel.name} has no program in it")
