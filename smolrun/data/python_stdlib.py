"""The source of the Python that runs this: real text on every machine, without any download.

Versions of Python differ, so the driver's text is the truth for all hosts.
"""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from smolrun.data.prepared import Progress
from smolrun.data.token_file import TextSource
from smolrun.errors import DataError

# Tests and installed packages are no part of the library; encodings and pydoc_data are tables
# rather than code.
_SKIPPED = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data"),
}


@dataclass(kw_only=True)
class PythonStdlib(TextSource):
    """The standard library as training data; conf/data/python_stdlib.yaml explains the keys."""

    name = "python_stdlib"

    def files(self, progress: Progress) -> dict[str, Path]:
        """Every module of the standard library."""
        return source_files()


def source_files() -> dict[str, Path]:
    """Name (relative, with /) -> path of every module of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths}
    if not files:
        raise DataError(
            f"this Python has no source files in {root}; use data=text data.path=FOLDER instead"
        )
    return files
