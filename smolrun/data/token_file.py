"""Documents to one file of token ids, train and eval part; made once and kept in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, Entry, cached
from smolrun.data.documents import Documents
from smolrun.data.encoders import Encoder, encoder_for
from smolrun.data.prepared import Prepared, Progress
from smolrun.errors import DataError

# Long documents are encoded in pieces, so that progress can be shown and all cores have work.
_PIECE_CHARACTERS = 100_000


def prepare_tokens(
    cache_dir: Path,
    name: str,
    documents: Documents,
    progress: Progress,
    *,
    tokenizer: str,
    vocab_size: int,
    sequence_length: int,
    eval_fraction: float,
) -> Prepared:
    """Tokenised documents from the cache, or made now.

    Raises DataError for settings that make no sense and for text too short for one window of
    sequence_length + 1 tokens in train or in eval.
    """
    check_numbers(sequence_length, eval_fraction)
    encoder = encoder_for(tokenizer, vocab_size, progress)
    key = {"documents": documents.sha256, "eval_fraction": eval_fraction, **encoder.key}

    def make(folder: Path) -> dict[str, Any]:
        return _write(folder, documents, encoder, eval_fraction, progress)

    entry = cached(cache_dir, name, key, make)
    for part in ("train", "eval"):
        _check_length(entry, part, sequence_length)
    facts = entry.facts
    return Prepared(
        kind="tokens",
        path=str(entry.data_path),
        sha256=entry.sha256,
        num_outputs=facts["vocab_size"],
        num_inputs=None,
        sequence_length=sequence_length,
        tokenizer=str(entry.folder),
        train_size=(facts["train"] - 1) // sequence_length,
        eval_size=(facts["eval"] - 1) // sequence_length,
        description=describe(name, documents, encoder.name, facts),
    )


def _write(
    folder: Path,
    documents: Documents,
    encoder: Encoder,
    eval_fraction: float,
    progress: Progress,
) -> dict[str, Any]:
    """Fills a new cache entry; returns the number of tokens in each part and the vocabulary."""
    train, held_out = documents.parts(eval_fraction)
    # From train only: the tokenizer must not have seen the eval text either.
    tokenizer = encoder.make(folder, train)
    dtype = token_dtype(tokenizer.vocab_size)
    total = documents.characters
    done = 0
    parts: dict[str, numpy.ndarray] = {}
    for part, texts in (("train", train), ("eval", held_out)):
        rows = [numpy.empty(0, dtype)]
        for text in texts:
            pieces = list(_pieces(text))
            rows += [numpy.asarray(ids, dtype) for ids in tokenizer.encode_batch(pieces)]
            rows.append(numpy.asarray([tokenizer.end_id], dtype))
            done += len(text)
            progress("encoding text", done, total)
        parts[part] = numpy.concatenate(rows)
    save_file(parts, folder / DATA_FILE)
    sizes = {part: len(tokens) for part, tokens in parts.items()}
    return {**sizes, "vocab_size": tokenizer.vocab_size}


def token_dtype(vocab_size: int) -> Any:
    """The smallest type that holds every id."""
    return numpy.uint16 if vocab_size <= 1 << 16 else numpy.int32


def describe(name: str, documents: Documents, tokenizer: str, facts: Mapping[str, Any]) -> str:
    """One line about what was made of the documents."""
    megas = documents.characters / 1e6
    description = (
        f"{name}: {megas:.1f} M characters in {documents.count} documents, "
        f"{facts['train']:,} train and {facts['eval']:,} eval tokens, "
        f"{tokenizer} tokenizer of {facts['vocab_size']}"
    )
    if documents.replaced_characters:
        replaced, files = documents.replaced_characters, documents.replaced_files
        description += f"; {replaced} characters in {files} files were not UTF-8"
    return description


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most _PIECE_CHARACTERS, each ending with a line if it can."""
    start = 0
    while start < len(text):
        stop = min(len(text), start + _PIECE_CHARACTERS)
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def check_numbers(sequence_length: int, eval_fraction: float) -> None:
    """Raises DataError for what the configuration would have refused."""
    problems = []
    if sequence_length < 1:
        problems.append(f"data.sequence_length={sequence_length}: must be at least 1")
    if not 0 < eval_fraction < 1:
        problems.append(f"data.eval_fraction={eval_fraction}: must be above 0 and below 1")
    if problems:
        raise DataError("; ".join(problems))


def _check_length(entry: Entry, part: str, sequence_length: int) -> None:
    if entry.facts[part] > sequence_length:
        return
    remedy = "raise data.eval_fraction" if part == "eval" else "lower data.eval_fraction"
    raise DataError(
        f"the text is too short: its {part} part has {entry.facts[part]} tokens, one sample needs "
        f"{sequence_length + 1}; give more text, lower data.sequence_length or {remedy}"
    )
