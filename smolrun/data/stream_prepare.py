"""What a stream needs before it is read: a tokenizer, and an evaluation part that is finite.

Both come from the first documents, which are kept as a token file like that of any other data. The
documents of the evaluation part are never trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, cached
from smolrun.data.encoders import Encoder, encoder_for
from smolrun.data.prepared import Prepared, Progress
from smolrun.data.stream import DocumentSource, Packing, StreamReader
from smolrun.data.token_file import token_dtype
from smolrun.errors import DataError

# Merges learnt from this much text are as good as those from more (see encoders.py).
_LEARNING_CHARACTERS = 4_000_000


def prepare_stream(
    cache_dir: Path,
    name: str,
    source: DocumentSource,
    progress: Progress,
    *,
    eval_source: DocumentSource | None,
    eval_documents: int,
    tokenizer: str,
    vocab_size: int,
    sequence_length: int,
    block_documents: int,
    prefetch_steps: int,
) -> Prepared:
    """The first `eval_documents` of `eval_source` as the evaluation part, from the cache or made
    now; without an `eval_source` they are those of the stream, which then begins behind them.

    Raises DataError for a stream that cannot be read or is too short.
    """
    encoder = encoder_for(tokenizer, vocab_size, progress)
    first_document = 0 if eval_source is not None else eval_documents
    held_out = _read(eval_source or source, 0, eval_documents, progress)
    learns = encoder.key["tokenizer"] == "bpe"
    texts = _first_texts(source, first_document, progress) if learns else []
    key = {"eval": _hash(held_out), "learnt from": _hash(texts), **encoder.key}
    entry = cached(cache_dir, name, key, lambda folder: _write(folder, encoder, texts, held_out))
    facts = entry.facts
    _check_length(facts["eval"], len(held_out), sequence_length)
    return Prepared(
        kind="tokens",
        path=str(entry.data_path),
        sha256=entry.sha256,
        num_outputs=facts["vocab_size"],
        num_inputs=None,
        sequence_length=sequence_length,
        tokenizer=str(entry.folder),
        train_size=0,
        eval_size=(facts["eval"] - 1) // sequence_length,
        description=f"{name}: a stream of documents, {facts['eval']:,} eval tokens, "
        f"{encoder.name} tokenizer of {facts['vocab_size']}",
        stream={
            "first_document": first_document,
            "block_documents": block_documents,
            "prefetch_steps": prefetch_steps,
        },
    )


def open_stream(
    prepared: Prepared,
    source: DocumentSource,
    *,
    seed: int,
    row: int = 0,
    bookmark: Mapping[str, Any] | None = None,
) -> StreamReader:
    """The reader of a prepared stream, from row `row` on; nothing is read yet.

    Raises DataError for a bookmark that is not of this stream.
    """
    from smolrun.data.tokenizer import FILE_NAME, load_tokenizer

    assert prepared.stream is not None, "prepared by prepare_stream"
    folder = Path(prepared.tokenizer or "")
    tokenizer = load_tokenizer(folder)
    packing = Packing(
        encode_batch=tokenizer.encode_batch,
        end_id=tokenizer.end_id,
        sequence_length=prepared.sequence_length or 1,
        block_documents=prepared.stream["block_documents"],
        first_document=prepared.stream["first_document"],
        seed=seed,
        identity=prepared.sha256 + hashlib.sha256((folder / FILE_NAME).read_bytes()).hexdigest(),
    )
    return StreamReader(source, packing, row=row, bookmark=bookmark)


def _write(
    folder: Path, encoder: Encoder, texts: Sequence[str], held_out: Sequence[str]
) -> dict[str, Any]:
    """Fills a new cache entry; returns the number of eval tokens and the vocabulary."""
    tokenizer = encoder.make(folder, texts)
    dtype = token_dtype(tokenizer.vocab_size)
    rows = [[*ids, tokenizer.end_id] for ids in tokenizer.encode_batch(held_out) if ids]
    tokens = numpy.fromiter(itertools.chain.from_iterable(rows), dtype)
    save_file({"eval": tokens}, folder / DATA_FILE)
    return {"eval": len(tokens), "vocab_size": tokenizer.vocab_size}


def _check_length(tokens: int, documents: int, sequence_length: int) -> None:
    if tokens <= sequence_length:
        raise DataError(
            f"the evaluation part, {documents} documents of the stream, has {tokens} tokens, one "
            f"sample needs {sequence_length + 1}; raise data.eval_documents or lower "
            "data.sequence_length"
        )


def _read(source: DocumentSource, start: int, count: int, progress: Progress) -> list[str]:
    texts: list[str] = []
    for text in itertools.islice(source.documents(start, None), count):
        progress("reading the evaluation part", len(texts), count)
        texts.append(text)
    progress("reading the evaluation part", count, count)
    if len(texts) < count:
        raise DataError(
            f"the stream has {len(texts)} documents, fewer than data.eval_documents={count}"
        )
    return texts


def _first_texts(source: DocumentSource, start: int, progress: Progress) -> list[str]:
    """Enough text to learn a tokenizer from; the evaluation part is none of it."""

    def enough() -> Iterator[str]:
        done = 0
        for text in source.documents(start, None):
            progress("reading text to learn from", done, _LEARNING_CHARACTERS)
            yield text
            done += len(text)
            if done >= _LEARNING_CHARACTERS:
                return

    texts = list(enough())
    progress("reading text to learn from", 1, 1)
    return texts


def _hash(texts: Sequence[str]) -> str:
    hasher = hashlib.sha256()
    for text in texts:
        hasher.update(hashlib.sha256(text.encode("utf-8", "replace")).digest())
    return hasher.hexdigest()
