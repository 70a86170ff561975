"""Text to token ids and back. Both kinds know all bytes, so every text comes back exactly.

    bytes   256 tokens, one per byte value; nothing to learn
    bpe     256 bytes, an end token, and merges learnt from the text itself in seconds

Both are kept as the `tokenizer.json` that Hugging Face tools read too.
Source: arXiv:1508.07909 (byte pair encoding), byte-level as in GPT-2.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from smolrun.errors import DataError

# Said out loud, because tokenizers warns on every fork of a process that left it to chance.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

FILE_NAME = "tokenizer.json"
END_TOKEN = "<|endoftext|>"


class TextTokenizer:
    """Encodes and decodes. `vocab_size` counts all ids; `end_id` marks the end of a document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A file that happens to contain the words "<|endoftext|>" is text like any other.
        tokenizer.encode_special_tokens = True
        self.vocab_size: int = tokenizer.get_vocab_size()
        # The bytes tokenizer has no room for an end token: byte 0, hardly ever in a text, does it.
        self.end_id: int = tokenizer.token_to_id(END_TOKEN) or 0

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; faster than one by one, because it uses all cores."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are no whole character become U+FFFD."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into an existing folder."""
        self._tokenizer.save(str(folder / FILE_NAME))


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer kept in a folder (`Prepared.tokenizer`); raises DataError if unreadable."""
    path = Path(folder) / FILE_NAME
    try:
        return TextTokenizer(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # tokenizers raises plain Exception for what it does not understand
        raise DataError(f"cannot read the tokenizer {path}: {error}") from None


def bytes_tokenizer() -> TextTokenizer:
    """One token per byte; a token's id is its byte."""
    vocabulary = {character: value for value, character in enumerate(_byte_characters())}
    return TextTokenizer(_byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False))


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A tokenizer of `vocab_size` ids learnt from the texts; fewer if they have less to merge."""
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(END_TOKEN, special=True)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return TextTokenizer(tokenizer)


def _byte_level(model: models.Model, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte value, as in GPT-2's tokenizer."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = (chr(number) for number in range(256, 512))
    return [chr(value) if value in printable else next(others) for value in range(256)]
