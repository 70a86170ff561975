"""What `data.tokenizer` asks for: learnt from the text, plain bytes, or a model's own.

The libraries for it are loaded where a tokenizer is made, and not where the cache has the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.data.prepared import Progress
from smolrun.errors import DataError

if TYPE_CHECKING:
    from smolrun.data.tokenizer import TextTokenizer

# Merges learnt from this much text are as good as those from more, and it takes two seconds.
_BPE_TRAINING_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that is yet to be made. `key` is what its ids depend on, beside the text;
    `make(folder, texts)` writes it into the folder, learnt from the texts if it has to learn."""

    name: str
    key: dict[str, Any]
    make: Callable[[Path, Sequence[str]], TextTokenizer]


def encoder_for(tokenizer: str, vocab_size: int, progress: Progress) -> Encoder:
    """The encoder that `data.tokenizer` names; `auto` is bpe here, where no model is known.

    Raises DataError if there is no such tokenizer, or vocab_size is too small for bpe.
    """
    if tokenizer in ("auto", "bpe"):
        if vocab_size < 257:
            raise DataError(
                f"data.vocab_size={vocab_size}: bpe needs at least 257 (256 bytes and an end token)"
            )

        def learn(folder: Path, texts: Sequence[str]) -> TextTokenizer:
            from smolrun.data.tokenizer import train_bpe

            progress("learning the tokenizer", 0, 1)
            made = train_bpe(_first_characters(texts, _BPE_TRAINING_CHARACTERS), vocab_size)
            progress("learning the tokenizer", 1, 1)
            made.save(folder)
            return made

        return Encoder("bpe", {"tokenizer": "bpe", "vocab_size": vocab_size}, learn)
    if tokenizer == "bytes":
        return Encoder("bytes", {"tokenizer": "bytes"}, _bytes)
    return _foreign(tokenizer, progress)


def _bytes(folder: Path, texts: Sequence[str]) -> TextTokenizer:
    from smolrun.data.tokenizer import bytes_tokenizer

    made = bytes_tokenizer()
    made.save(folder)
    return made


def _foreign(name: str, progress: Progress) -> Encoder:
    from smolrun.data.foreign_tokenizer import find_tokenizer, keep_tokenizer, tokenizer_hash
    from smolrun.data.tokenizer import FILE_NAME

    found = find_tokenizer(name, progress)
    given = Path(name).parent if Path(name).name == FILE_NAME else Path(name)
    return Encoder(
        given.name,
        {"tokenizer": tokenizer_hash(found)},
        lambda folder, texts: keep_tokenizer(found, folder),
    )


def _first_characters(texts: Sequence[str], count: int) -> Iterator[str]:
    for text in texts:
        if count <= 0:
            return
        yield text[:count]
        count -= len(text)
