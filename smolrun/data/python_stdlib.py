"""The source of the Python that runs this: real text on every machine, without any download.

Versions of Python differ, so the driver's text is the truth for all hosts.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import ClassVar

from smolrun.data.documents import read_documents
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.data.token_file import prepare_tokens
from smolrun.errors import DataError

# Tests and installed packages are no part of the library; encodings and pydoc_data are tables
# rather than code.
_SKIPPED = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data"),
}


class PythonStdlib:
    """The standard library as training data; conf/data/python_stdlib.yaml explains the keys."""

    produces: ClassVar[Kind] = "tokens"

    def __init__(
        self,
        cache_dir: Path,
        *,
        tokenizer: str,
        vocab_size: int,
        sequence_length: int,
        eval_fraction: float,
        max_mb: float | None,
    ) -> None:
        self.cache_dir = cache_dir
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.eval_fraction = eval_fraction
        self.max_mb = max_mb

    def prepare(self, progress: Progress) -> Prepared:
        """Reads, tokenises and keeps the source; raises DataError if this Python has none."""
        return prepare_tokens(
            self.cache_dir,
            "python_stdlib",
            read_documents(source_files(), self.max_mb, progress),
            progress,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            sequence_length=self.sequence_length,
            eval_fraction=self.eval_fraction,
        )


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
