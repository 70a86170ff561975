"""Text to token ids and back. Our own kinds know all bytes, so every text comes back exactly.

    bytes    256 tokens, one per byte value; nothing to learn
    bpe      256 bytes, an end token, and merges learnt from the text itself in seconds
    foreign  a model's own, from its Hugging Face folder (see foreign_tokenizer.py)

All are kept as the `tokenizer.json` that Hugging Face tools read too.
Source: arXiv:1508.07909 (byte pair encoding), byte-level as in GPT-2.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from smolrun.errors import DataError
from smolrun.files import MAX_TOKENIZER_BYTES, read_bytes, read_json

# Said out loud, because tokenizers warns on every fork of a process that left it to chance.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

FILE_NAME = "tokenizer.json"
# Beside it lies, in a folder of Hugging Face's, which token means what.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
END_TOKEN = "<|endoftext|>"
_MAX_GROWTH = 1000  # usual replacements are one character long
NO_NAME = "\0"  # the end token of the bytes tokenizer, as text


class TextTokenizer:
    """Encodes and decodes. `vocab_size` is one more than the largest id; `end_id` marks the end
    of a document, and `end_token` is its text."""

    def __init__(self, tokenizer: Tokenizer, end_token: str = END_TOKEN) -> None:
        self._tokenizer = tokenizer
        # A file that happens to contain the words "<|endoftext|>" is text like any other.
        tokenizer.encode_special_tokens = True
        # What a folder of Hugging Face's asks for would cut and fill our texts in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.get_vocab().values()
        self.vocab_size: int = max(ids, default=-1) + 1
        end_id = tokenizer.token_to_id(end_token)
        if end_id is None and self.vocab_size != 256:
            raise DataError(
                f"none of its tokens is {end_token!r}, the end of a text; name the one that is, as "
                "eos_token in tokenizer_config.json beside it"
            )
        # The bytes tokenizer has no room for an end token: byte 0, hardly ever in a text, does it.
        self.end_id: int = 0 if end_id is None else end_id
        self.end_token: str = NO_NAME if end_id is None else end_token

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end token."""
        with _panics():
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; faster than one by one, because it uses all cores."""
        with _panics():
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_markup(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, where the name of a special token, such as <|im_end|>, is that
        token: for what a chat template wrote."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode_batch(texts)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are no whole character become U+FFFD."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into an existing folder."""
        self._tokenizer.save(str(folder / FILE_NAME))


def load_tokenizer(folder: str | Path, source: Path | None = None) -> TextTokenizer:
    """The tokenizer kept in a folder (`Prepared.tokenizer`); raises DataError if unreadable, about
    the folder that it was copied from, `source`."""
    path, shown = Path(folder) / FILE_NAME, source or Path(folder)
    try:
        with _panics():
            tokenizer = Tokenizer.from_str(read_bytes(path, MAX_TOKENIZER_BYTES).decode())
        _check_growth(tokenizer)
        return TextTokenizer(tokenizer, _end_token(Path(folder)) or END_TOKEN)
    except DataError as error:
        raise DataError(f"the tokenizer in {shown}: {error}") from None
    except Exception as error:  # tokenizers raises plain Exception for what it does not understand
        raise DataError(f"cannot read the tokenizer {shown / FILE_NAME}: {error}") from None


@contextmanager
def _panics() -> Iterator[None]:
    """tokenizers panics, past `Exception`, where a pattern takes more steps than its regex library
    allows, among others. Raises DataError for that."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"the tokenizer failed: {error}") from None


def _check_growth(tokenizer: Tokenizer) -> None:
    """ValueError where its replacements, one after the other, make a text much longer."""
    for part in (tokenizer.normalizer, tokenizer.decoder):
        if part is None:
            continue
        state = json.loads(part.__getstate__())
        steps = state.get("normalizers") or state.get("decoders") or [state]
        replaced = [step["content"] for step in steps if step.get("type") == "Replace"]
        if math.prod(max(1, len(text)) for text in replaced) > _MAX_GROWTH:
            raise ValueError(f"its replacements make a text more than {_MAX_GROWTH} times longer")


def _end_token(folder: Path) -> str | None:
    """What the folder calls its end-of-sequence token, or None where it says nothing of it."""
    for name in _SETTINGS:
        if (folder / name).is_file():
            token = read_json(folder / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


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
