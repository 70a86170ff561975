"""The folder of a run of our decoder, which gets checkpoints as if it still trained."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from smolrun.data.tokenizer import bytes_tokenizer
from tests.models.test_export import save
from tests.models.tiny import TINY, enliven, make_tiny_decoder

KEYS = {"vocab_size": 258, "max_sequence_length": 2048}


def make_run(folder: Path, **keys: object) -> Path:
    """A run without checkpoints."""
    section = {"name": "gpt_tiny", "target": "smolrun.models.decoder:build", **TINY, **KEYS, **keys}
    (folder / "tokenizer").mkdir(parents=True)
    bytes_tokenizer().save(folder / "tokenizer")
    (folder / "config.yaml").write_bytes(msgspec.yaml.encode({"model": section}))
    return folder


def add_checkpoint(run: Path, step: int, *, has_nan: bool = False, **keys: object) -> Path:
    """A checkpoint whose weights differ from those of every other step."""
    model = enliven(make_tiny_decoder(seed=step, **{**KEYS, **keys}))
    with torch.no_grad():
        if has_nan:
            next(model.parameters()).fill_(float("nan"))
    (run / "checkpoints").mkdir(exist_ok=True)
    return save(run / "checkpoints", model, step=step)
