"""Text files read as documents, and their split into train and eval without a shared line."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smolrun.data.prepared import Progress
from smolrun.errors import DataError

# More than this share of unreadable characters means: not text at all (a picture, an archive).
MOST_REPLACED = 0.1


@dataclass(frozen=True)
class Documents:
    """The texts, and what had to be replaced because it was not valid UTF-8.

    `held_out`: texts for evaluation; None: a part of `texts` is to be kept for it.
    """

    texts: list[str]
    sha256: str
    replaced_characters: int = 0
    replaced_files: int = 0
    held_out: list[str] | None = None

    def parts(self, eval_fraction: float) -> tuple[list[str], list[str]]:
        """The texts to train on, and those to evaluate on."""
        if self.held_out is not None:
            return self.texts, self.held_out
        return split_documents(self.texts, eval_fraction)

    @property
    def characters(self) -> int:
        """Of all texts together."""
        return sum(map(len, self.texts)) + sum(map(len, self.held_out or ()))

    @property
    def count(self) -> int:
        """Of all texts together."""
        return len(self.texts) + len(self.held_out or ())


def read_documents(
    files: Mapping[str, Path | bytes], max_mb: float | None, progress: Progress
) -> Documents:
    """Reads files (name -> path, or what is in it), at most `max_mb` of text (10^6 bytes each; None
    for all of it).

    Documents come in the order of their names' hashes, so that the first few are a fair mix of all
    folders. Raises DataError for a file that cannot be read, for no text at all, and for files that
    are not text.
    """
    room = None if max_mb is None else int(max_mb * 1e6)
    texts: list[str] = []
    hasher = hashlib.sha256()
    replaced_characters = replaced_files = 0
    for done, name in enumerate(sorted(files, key=lambda name: _hash(name.encode()))):
        progress("reading text", done, len(files))
        text, replaced = _read(files[name], room)
        replaced_characters += replaced
        replaced_files += replaced > 0
        if text.strip():
            texts.append(text)
            encoded = text.encode()
            hasher.update(_hash(encoded))
            room = None if room is None else room - len(encoded)
        if room is not None and room <= 0:
            break
    progress("reading text", len(files), len(files))
    if not texts:
        names = [name if isinstance(file, bytes) else str(file) for name, file in files.items()]
        raise DataError(f"there is no text in {', '.join(names)[:200]}: empty")
    if replaced_characters > MOST_REPLACED * sum(map(len, texts)):
        raise DataError(
            f"{replaced_characters} characters in {replaced_files} of {len(files)} files are not "
            "UTF-8: this is not text; set data.glob so that it finds text files only"
        )
    return Documents(texts, hasher.hexdigest(), replaced_characters, replaced_files)


def split_documents(texts: list[str], eval_fraction: float) -> tuple[list[str], list[str]]:
    """(train, eval): the last documents, together `eval_fraction` of all characters, are for eval.

    The document that the border falls into is cut at a line's end, so one long file is split too.
    No character is in both parts.
    """
    room = round(sum(map(len, texts)) * (1 - eval_fraction))
    train: list[str] = []
    held_out: list[str] = []
    for text in texts:
        cut = len(text) if len(text) <= room else text.rfind("\n", 0, room) + 1 or room
        room = room - cut if cut == len(text) else 0
        if text[:cut]:
            train.append(text[:cut])
        if text[cut:]:
            held_out.append(text[cut:])
    return train, held_out


def split_between(texts: list[str], eval_fraction: float) -> tuple[list[str], list[str]]:
    """As `split_documents`, but between two documents: each part has at least one, whole."""
    room = sum(map(len, texts)) * (1 - eval_fraction)
    border = 0
    while border < len(texts) and len(texts[border]) <= room:
        room -= len(texts[border])
        border += 1
    border = min(max(border, 1), len(texts) - 1)
    return texts[:border], texts[border:]


def _read(source: Path | bytes, most_bytes: int | None) -> tuple[str, int]:
    """A file's text, and how many of its characters had to be replaced as unreadable."""
    if isinstance(source, bytes):
        data = source[:most_bytes]
    else:
        try:
            with open(source, "rb") as file:
                data = file.read(-1 if most_bytes is None else most_bytes)
        except OSError as error:
            raise DataError(f"cannot read {source}: {error.strerror}") from None
    # Windows editors write UTF-16 and a mark in front of UTF-8.
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    # A file cut by most_bytes may end within a character, which is then dropped, not replaced.
    text = decoder.decode(data, final=len(data) != most_bytes)
    replaced = text.count("\ufffd") - data.count("\ufffd".encode())
    return text.replace("\r\n", "\n"), max(0, replaced)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
