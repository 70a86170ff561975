"""What a model must fit, told by the configuration alone, without making any data ready."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from smolrun.config import RunConfig
from smolrun.config.base import CustomTargetConfig
from smolrun.driver.outputs import prepare_data
from smolrun.driver.prepare import prepare_model, tokenizer_for
from smolrun.files import MAX_TOKENIZER_BYTES, read_json

_PIXELS = 28 * 28  # all data sets of pictures here have this many, and ten classes
_BYTES = 256


@dataclass(frozen=True)
class Spec:
    """As `Prepared`, as far as a model asks for it. `notes` says what had to be assumed."""

    num_outputs: int
    num_inputs: int | None
    sequence_length: int | None
    model_folder: str | None = None
    notes: tuple[str, ...] = field(default=())


def spec_of(config: RunConfig) -> Spec:
    """What the data asks of the model. One's own data is made ready, as only it knows its sizes.

    ConfigError where the model or its tokenizer cannot be had.
    """
    data = config.data
    if isinstance(data, CustomTargetConfig):
        own = prepare_data(config, lambda *_: None)
        return Spec(own.num_outputs, own.num_inputs, own.sequence_length)
    if data.produces == "features":
        return Spec(10, _PIXELS, None)
    model = config.model
    if hasattr(model, "pretrained"):  # its shape is enough: do not fetch weights for that
        model = model.model_copy(update={"pretrained": False})
    fetched = prepare_model(config.model_copy(update={"model": model}), lambda *_: None)
    vocabulary, notes = _vocabulary(config, tokenizer_for(config, fetched))
    return Spec(
        num_outputs=vocabulary,
        num_inputs=None,
        sequence_length=getattr(data, "sequence_length", None) or 1,
        model_folder=fetched.folder if fetched else None,
        notes=notes,
    )


def _vocabulary(config: RunConfig, tokenizer: str | None) -> tuple[int, tuple[str, ...]]:
    wanted = int(getattr(config.data, "vocab_size", None) or 0)
    if tokenizer in ("bpe", None):
        return wanted or _BYTES, ()
    if tokenizer == "bytes":
        return _BYTES, ()
    try:
        known = read_json(Path(tokenizer) / "tokenizer.json", MAX_TOKENIZER_BYTES)
        ids = [token["id"] for token in known.get("added_tokens") or []]
        ids += known["model"]["vocab"].values()
        return max(ids) + 1, ()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        assumed = wanted or 32_000
        note = f"the vocabulary of data.tokenizer={tokenizer} is not known here: {assumed} assumed"
        return assumed, (note,)
