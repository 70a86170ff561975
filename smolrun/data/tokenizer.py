"""Text to token ids and back. Our own kinds know all bytes, so every text comes back exactly.

    bytes    256 tokens, one per byte value; not trained
    bpe      256 bytes, an end token, and merges trained on the text itself in seconds
    a model's own, from its Hugging Face folder or from the hub: only files are read, no code runs

All are kept as the `tokenizer.json` that Hugging Face tools read too.
Source: arXiv:1508.07909 (byte pair encoding), byte-level as in GPT-2.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from smolrun.data.prepared import Progress
from smolrun.errors import DataError
from smolrun.files import MAX_TOKENIZER_BYTES, read_bytes, read_json

# Set, because tokenizers warns on every fork of a process where it is not.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

FILE_NAME = "tokenizer.json"
# Beside it lies, in a folder of Hugging Face's, which token means what.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
END_TOKEN = "<|endoftext|>"
_ROLE_MARKER = re.compile("<[|\N{FULLWIDTH VERTICAL LINE}].+[|\N{FULLWIDTH VERTICAL LINE}]>")
_MAX_GROWTH = 1000  # usual replacements are one character long
NO_NAME = "\0"  # the end token of the bytes tokenizer, as text
# The files of a tokenizer; weights and code are never among them.
FILES = (
    *(FILE_NAME, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
# Merges trained on this much text are as good as those from more, and it takes two seconds.
BPE_TRAINING_CHARACTERS = 4_000_000


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
        # The bytes tokenizer has no id for an end token: byte 0 is used, which texts almost never
        # have.
        self.end_id: int = 0 if end_id is None else end_id
        self.end_token: str = NO_NAME if end_id is None else end_token
        self._byte_decoder: dict[str, int] | None = None  # made when it is needed
        self._has_byte_fallback = False

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

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text as a model of the tokenizer's origin expects its input to begin: with a
        start token where its post-processor adds one. Special tokens in the text stay text."""
        with _panics():
            start = [] if not text else self._tokenizer.encode("", add_special_tokens=True).ids
        return [*start, *self.encode(text)]

    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the control tokens, such as <|im_end|>, which are no part of an answer."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def role_markers(self) -> list[str]:
        """Names of the tokens that only a template may write: the special ones, and others with
        such a name (those for roles in DeepSeek's models are not special). Tags as <think> are
        none, since templates look for them in messages."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return [one.content for one in added if one.special or _ROLE_MARKER.fullmatch(one.content)]

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8; a part of a character where it is one. Empty for
        an id without a token."""
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_decoder is None:
            steps = _decoder_types(self._tokenizer)
            characters = _byte_characters() if "ByteLevel" in steps else []
            self._byte_decoder = {c: value for value, c in enumerate(characters)}
            self._has_byte_fallback = "ByteFallback" in steps
        if self._byte_decoder:
            if all(character in self._byte_decoder for character in piece):
                return bytes(self._byte_decoder[character] for character in piece)
            return str(piece).encode()
        if self._has_byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

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


def _decoder_types(tokenizer: Tokenizer) -> set[str]:
    """The steps in which it makes text of tokens; Metaspace marks spaces as sentencepiece does."""
    if tokenizer.decoder is None:
        return set()
    state = json.loads(tokenizer.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders") or [state]}


def _end_token(folder: Path) -> str | None:
    """The eos_token of the folder, or None."""
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
    """A tokenizer of `vocab_size` ids trained on the texts; fewer if they have less to merge."""
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
            f"({reason}); use bpe, bytes, or a folder with {FILE_NAME}"
        ) from None
    progress(f"fetching the tokenizer {name}", 1, 1)
    return Path(folder)


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that is not made yet. `key` is what its ids depend on, beside the text;
    `make(folder, texts)` writes it into the folder, trained on the texts if it is bpe."""

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

        def train(folder: Path, texts: Sequence[str]) -> TextTokenizer:
            progress("training the tokenizer", 0, 1)
            made = train_bpe(_first_characters(texts, BPE_TRAINING_CHARACTERS), vocab_size)
            progress("training the tokenizer", 1, 1)
            made.save(folder)
            return made

        return Encoder("bpe", {"tokenizer": "bpe", "vocab_size": vocab_size}, train)
    if tokenizer == "bytes":
        return Encoder("bytes", {"tokenizer": "bytes"}, _bytes)
    return _foreign(tokenizer, progress)


def _bytes(folder: Path, texts: Sequence[str]) -> TextTokenizer:
    made = bytes_tokenizer()
    made.save(folder)
    return made


def _foreign(name: str, progress: Progress) -> Encoder:
    found = find_tokenizer(name, progress)
    given = Path(name).parent if Path(name).name == FILE_NAME else Path(name)
    # A run keeps its tokenizer in a folder of that name.
    title = given.parent.name if given.name == "tokenizer" else given.name
    return Encoder(
        title,
        {"tokenizer": tokenizer_hash(found)},
        lambda folder, texts: keep_tokenizer(found, folder),
    )


def _first_characters(texts: Sequence[str], count: int) -> Iterator[str]:
    for text in texts:
        if count <= 0:
            return
        yield text[:count]
        count -= len(text)
