"""The code of a run as one archive: the same bytes for the same files, and a hash that names it.

    lib/smolrun/...                      our package, first on the worker's path
    lib/smolrun-0.1.0.dist-info/METADATA  so that it knows its own version
    own/...                              the user's modules: the worker's current folder

Two folders, as the user's modules come last on the path, where they hide no library.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from smolrun.launch.delivery.code_tree import own_modules, package_files

LIB, OWN = "lib", "own"
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip file knows
_NOTE = (
    b"The user's own modules, as they were where the run was started. smolrun owns this folder.\n"
)


@dataclass(frozen=True)
class CodeArchive:
    """`files` by name, `digest` of their names and contents (hex), `own` the user's among them."""

    files: Mapping[str, bytes]
    digest: str

    @property
    def listing(self) -> dict[str, tuple[int, str]]:
        """Size and sha256 of every file."""
        return {
            name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in self.files.items()
        }

    @property
    def own(self) -> list[str]:
        """The user's own files, by their names in the user's folder."""
        prefix = f"{OWN}/"
        return [name[len(prefix) :] for name in self.files if name.startswith(prefix)][1:]

    def pack(self, names: Iterable[str] | None = None) -> bytes:
        """A zip file of these files, or of all."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self.files if names is None else names):
                entry = zipfile.ZipInfo(name, _TIME)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.create_system = 3  # Unix, also where this is made on Windows
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, self.files[name])
        return buffer.getvalue()


def code_archive(folder: Path, targets: Iterable[str]) -> CodeArchive:
    """Our package and what `targets` (model.target and the like) need of the user's `folder`."""
    number = version("smolrun")
    metadata = f"Metadata-Version: 2.1\nName: smolrun\nVersion: {number}\n"
    files = {
        **{f"{LIB}/{name}": path.read_bytes() for name, path in package_files().items()},
        f"{LIB}/smolrun-{number}.dist-info/METADATA": metadata.encode(),
        f"{OWN}/.smolrun": _NOTE,
        **{
            f"{OWN}/{name}": path.read_bytes()
            for name, path in own_modules(folder, targets).items()
        },
    }
    return CodeArchive(dict(sorted(files.items())), _digest(files))


def _digest(files: Mapping[str, bytes]) -> str:
    """Of what is in the files, not of the archive, which depends on the machine's zlib."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\n{hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()
