"""Your own text: one file, or all files of some folders that match a pattern."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from smolrun.data.documents import read_documents
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.data.token_file import prepare_tokens
from smolrun.errors import DataError


class TextFiles:
    """Text files as training data; the keys are explained in conf/data/text.yaml."""

    produces: ClassVar[Kind] = "tokens"

    def __init__(
        self,
        cache_dir: Path,
        *,
        path: str | Sequence[str],
        glob: str,
        tokenizer: str,
        vocab_size: int,
        sequence_length: int,
        eval_fraction: float,
        max_mb: float | None,
    ) -> None:
        self.cache_dir = cache_dir
        self.paths = [path] if isinstance(path, str) else list(path)
        self.glob = glob
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.eval_fraction = eval_fraction
        self.max_mb = max_mb

    def prepare(self, progress: Progress) -> Prepared:
        """Reads, tokenises and keeps the text; raises DataError for none or too little of it."""
        return prepare_tokens(
            self.cache_dir,
            "text",
            read_documents(self._files(), self.max_mb, progress),
            progress,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            sequence_length=self.sequence_length,
            eval_fraction=self.eval_fraction,
        )

    def _files(self) -> dict[str, Path]:
        """Name -> path; names are relative to data.path, so a moved folder is the same data."""
        if not self.paths:
            raise DataError("data.path names no file and no folder")
        files: dict[str, Path] = {}
        for number, given in enumerate(self.paths):
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
