"""Your own text: one file, or all files of some folders that match a pattern."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolrun.data.documents import MOST_REPLACED
from smolrun.data.prepared import Progress
from smolrun.data.token_file import TextSource
from smolrun.errors import DataError

_MOST_KINDS, _MOST_LOOKED_AT = 20, 5  # of the files of a folder in which nothing was found


@dataclass(kw_only=True)
class TextFiles(TextSource):
    """Text files as training data; the keys are explained in conf/data/text.yaml."""

    name = "text"

    path: str | Sequence[str]
    glob: str | Sequence[str]

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
                found = self._found(path)
                files |= {f"{number}/{file.relative_to(path).as_posix()}": file for file in found}
            else:
                where = path.absolute()
                raise DataError(f"data.path={given!r}: there is no file or folder {where}")
        return files

    def _found(self, folder: Path) -> list[Path]:
        """The files that a pattern matches, once each; DataError that proposes a pattern if there
        are none."""
        patterns = [self.glob] if isinstance(self.glob, str) else list(self.glob)
        found = {file for pattern in patterns for file in _matching(folder, pattern)}
        if not found:
            what = f"no file in the folder {folder} matches data.glob={','.join(patterns)}"
            raise DataError(f"{what}; {_proposal(folder)}")
        return sorted(found)


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    """Hidden files and folders (.git, .obsidian) are for patterns that name one."""
    names_hidden = any(part.startswith(".") for part in Path(pattern).parts)
    for file in folder.glob(pattern):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and (names_hidden or not is_hidden):
            yield file


def _proposal(folder: Path) -> str:
    """The kind of text files that the folder has most of."""
    files = list(_matching(folder, "**/*"))
    if not files:
        return "there are no files in it"
    for suffix, count in Counter(file.suffix for file in files).most_common(_MOST_KINDS):
        of_kind = [file for file in files if file.suffix == suffix]
        if suffix and any(map(_is_text, of_kind[:_MOST_LOOKED_AT])):
            return f"it has {count:,} text files *{suffix}: data.glob='**/*{suffix}'"
    kinds = Counter(file.suffix or "without a suffix" for file in files).most_common(3)
    shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
    return f"there is no text in it that can be read ({shown})"


def _is_text(file: Path) -> bool:
    """By its beginning."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(4096)
    except OSError:
        return False
    text = begin.decode(errors="replace")
    return b"\0" not in begin and text.count("\ufffd") < MOST_REPLACED * len(text)
