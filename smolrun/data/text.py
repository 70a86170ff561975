"""Your own text: one file, or all files of some folders that match a pattern."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smolrun.data.prepared import Progress
from smolrun.data.token_file import TextSource
from smolrun.errors import DataError


@dataclass(kw_only=True)
class TextFiles(TextSource):
    """Text files as training data; the keys are explained in conf/data/text.yaml."""

    name = "text"

    path: str | Sequence[str]
    glob: str

    def files(self, progress: Progress) -> dict[str, Path]:
        """Name -> path; names are relative to data.path, so a moved folder is the same data."""
        paths = [self.path] if isinstance(self.path, str) else self.path
        if not paths:
            raise DataError("data.path names no file and no folder")
        files: dict[str, Path] = {}
        for number, given in enumerate(paths):
            path = Path(os.path.expanduser(given))
            if path.is_file():
                files[f"{number}/{path.name}"] = path
            elif path.is_dir():
                found = sorted(file for file in path.glob(self.glob) if file.is_file())
                if not found:
                    raise DataError(f"no file in the folder {path} matches data.glob={self.glob!r}")
                files |= {f"{number}/{file.relative_to(path).as_posix()}": file for file in found}
            else:
                where = path.absolute()
                raise DataError(f"data.path={given!r}: there is no file or folder {where}")
        return files
