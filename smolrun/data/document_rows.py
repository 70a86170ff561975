"""Documents that never share a sample: each begins a row of its own, and the rest is filled up.

The other way, documents one after the other in windows, is token_file.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, cached
from smolrun.data.documents import Documents
from smolrun.data.encoders import Encoder, encoder_for
from smolrun.data.prepared import Prepared, Progress
from smolrun.data.row_file import Marked, rows_of
from smolrun.data.token_file import check_numbers, describe
from smolrun.errors import DataError

_AT_ONCE = 256  # documents: the tokenizer then has work for all cores


def prepare_rows(
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
    """Documents as rows of sequence_length + 1 tokens, from the cache or made now; a longer one
    goes on in the next row. Raises DataError for settings that make no sense and for no text.
    """
    check_numbers(sequence_length, eval_fraction)
    encoder = encoder_for(tokenizer, vocab_size, progress)
    key = {
        "documents": documents.sha256,
        "eval_fraction": eval_fraction,
        "rows": sequence_length,
        **encoder.key,
    }

    def make(folder: Path) -> dict[str, Any]:
        return _write(folder, documents, encoder, eval_fraction, sequence_length, progress)

    entry = cached(cache_dir, name, key, make)
    facts = entry.facts
    return Prepared(
        kind="tokens",
        path=str(entry.data_path),
        sha256=entry.sha256,
        num_outputs=facts["vocab_size"],
        num_inputs=None,
        sequence_length=sequence_length,
        tokenizer=str(entry.folder),
        train_size=facts["train_rows"],
        eval_size=facts["eval_rows"],
        description=describe(name, documents, encoder.name, facts),
        masked=True,
    )


def _write(
    folder: Path,
    documents: Documents,
    encoder: Encoder,
    eval_fraction: float,
    sequence_length: int,
    progress: Progress,
) -> dict[str, Any]:
    parts = dict(zip(("train", "eval"), documents.parts(eval_fraction), strict=True))
    tokenizer = encoder.make(folder, parts["train"])
    facts: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    tensors: dict[str, Any] = {}
    for part, texts in parts.items():
        if not texts:
            raise DataError(f"there is no document for the {part} part; change data.eval_fraction")
        pieces: list[Marked] = []
        facts[part] = 0
        for start in range(0, len(texts), _AT_ONCE):
            progress(f"encoding {part} text", start, len(texts))
            for ids in tokenizer.encode_batch(texts[start : start + _AT_ONCE]):
                whole = Marked.of([*ids, tokenizer.end_id], [True] * (len(ids) + 1))
                pieces += whole.pieces(sequence_length + 1)
                facts[part] += len(whole)
        progress(f"encoding {part} text", len(texts), len(texts))
        rows = rows_of(
            pieces,
            sequence_length + 1,
            end_id=tokenizer.end_id,
            vocab_size=tokenizer.vocab_size,
            packing=False,
        )
        tensors |= {part: rows.tokens, f"{part}_learn": rows.learn}
        facts[f"{part}_rows"] = len(rows)
    save_file(tensors, folder / DATA_FILE)
    return facts
