"""A model's own tokenizer, from a folder or from the Hugging Face hub: found, and kept beside data.

Only files are read: no code of a repository runs. What is kept is a folder that `load_tokenizer`
and Hugging Face tools read alike.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from smolrun.data.prepared import Progress
from smolrun.data.tokenizer import FILE_NAME, TextTokenizer, load_tokenizer
from smolrun.errors import DataError

# Everything that says how text becomes tokens; weights and code are never among them.
FILES = (
    *(FILE_NAME, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
OURS = ("auto", "bpe", "bytes")  # values of data.tokenizer that are no folder and no name


def find_tokenizer(name: str, progress: Progress) -> Path:
    """The folder of the tokenizer `name`: a folder of yours, or a model of the hub, fetched once.

    Raises DataError if there is none.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_file() and folder.name == FILE_NAME:
        folder = folder.parent
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(("~", ".")) or name.count("/") > 1:
            raise DataError(f"data.tokenizer={name}: there is no folder {folder.absolute()}")
        folder = _fetch(name, progress)
    if not any((folder / file).is_file() for file in FILES):
        raise DataError(f"data.tokenizer={name}: there is no tokenizer in {folder}")
    return folder


def tokenizer_hash(folder: Path) -> str:
    """Of every file that `keep_tokenizer` would copy."""
    hasher = hashlib.sha256()
    for file in FILES:
        if (folder / file).is_file():
            hasher.update(f"{file}:{(folder / file).stat().st_size}:".encode())
            hasher.update((folder / file).read_bytes())
    return hasher.hexdigest()


def keep_tokenizer(folder: Path, into: Path) -> TextTokenizer:
    """Copies the tokenizer into a folder and loads it from there.

    One without tokenizer.json is written anew in that form. Raises DataError if that fails.
    """
    for file in FILES:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, into / file)
    if not (into / FILE_NAME).is_file():
        _convert(folder, into)
    return load_tokenizer(into, folder)


def _convert(folder: Path, into: Path) -> None:
    from transformers import AutoTokenizer  # seconds, and only old folders need it

    try:
        with tempfile.TemporaryDirectory(dir=into.parent) as made:
            AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(made)
            for file in FILES:
                if (Path(made) / file).is_file():
                    shutil.copyfile(Path(made) / file, into / file)
    except Exception as error:  # whatever the library meets in a foreign folder
        raise DataError(
            f"cannot turn the tokenizer in {folder} into {FILE_NAME}: {error}"
        ) from None
    if not (into / FILE_NAME).is_file():
        raise DataError(f"the tokenizer in {folder} cannot be kept as {FILE_NAME}")


def _fetch(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the console shows ours
    progress(f"fetching the tokenizer {name}", 0, 1)
    try:
        folder = snapshot_download(name, allow_patterns=list(FILES))
    except Exception as error:  # no network, no such name, no permission: each has its own class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data.tokenizer={name}: there is no such folder, and the hub does not give it "
            f"({reason}); say bpe, bytes, or a folder with {FILE_NAME}"
        ) from None
    progress(f"fetching the tokenizer {name}", 1, 1)
    return Path(folder)
