"""Data and model, ready on the driver before anything starts: prepared, fetched, or found so.

Also decides whose tokenizer the data uses, and checks that model and data fit each other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from smolrun.checkpoints.run_names import run_folder
from smolrun.config import RunConfig
from smolrun.config.base import CustomTargetConfig
from smolrun.config.data import ChatConfig, TextFilesConfig
from smolrun.config.models import HuggingFaceConfig
from smolrun.config.suggest import absent, problem
from smolrun.data.cache import cache_folder
from smolrun.data.prepared import Prepared
from smolrun.errors import CheckpointError, ConfigError, DataError
from smolrun.files import MAX_TOKENIZER_BYTES, read_json
from smolrun.targets import load_target
from smolrun.tracking.run_folder import OUTPUTS

if TYPE_CHECKING:
    from smolrun.data.prepared import Progress
    from smolrun.models.huggingface_folder import ModelFolder


_PIXELS = 28 * 28  # all image data sets here have this many, and ten classes
_BYTES = 256
_FILES = (".json", ".jsonl", ".parquet", ".csv")  # no names of the hub


@dataclass(frozen=True)
class DataSpec:
    """The sizes that a model is built for, as in `Prepared`. `notes` says what was assumed."""

    num_outputs: int
    num_inputs: int | None
    sequence_length: int | None
    model_folder: str | None = None
    notes: tuple[str, ...] = ()


def prepare_model(config: RunConfig, progress: Progress) -> ModelFolder | None:
    """The model of the config, ready on this machine; None for one that needs no fetching."""
    if isinstance(config.model, CustomTargetConfig):
        return None
    module = import_module(config.model.target.partition(":")[0])
    prepare = getattr(module, "prepare", None)
    if prepare is None:
        return None
    cache = cache_folder("models")
    found: ModelFolder = prepare(cache, progress, config.model.name, **config.model.keywords())
    return found


def with_pinned_model(config: RunConfig) -> RunConfig:
    """The configuration with the commit of its hub model in `model.revision`, before it is kept."""
    model = config.model
    if not isinstance(model, HuggingFaceConfig):
        return config
    from smolrun.models.huggingface import pinned_revision

    revision = pinned_revision(model.name, model.revision)
    pinned = model.model_copy(update={"revision": revision})
    return config.model_copy(update={"model": pinned})


def tokenizer_for(config: RunConfig, model: ModelFolder | None) -> str | None:
    """What `data.tokenizer=auto` means beside this model; other values stay as they are.

    None where the data has no tokenizer. ConfigError where weights that were trained on one
    vocabulary would have to learn another.
    """
    asked: str | None = getattr(config.data, "tokenizer", None)
    if asked != "auto":
        return asked
    if (run := config.checkpoint.weights) is not None:
        # A run keeps its tokenizer: once it is resumed, the earlier one need not be there.
        return _tokenizer_of(config.checkpoint.resume or run)
    if model is None:
        return "bpe"
    if model.tokenizer_folder is None:
        if getattr(config.model, "pretrained", False):
            raise ConfigError(
                f"model.name={config.model.name} brings no tokenizer; name one that fits it: "
                "data.tokenizer=NAME|FOLDER"
            )
        return "bpe"
    return model.tokenizer_folder


def _tokenizer_of(run: str) -> str:
    """The tokenizer of an earlier run, whose ids its weights know."""
    try:
        folder = run_folder(run, OUTPUTS) / "tokenizer"
    except CheckpointError as error:
        raise ConfigError(problem("checkpoint.weights", run, str(error))) from None
    if not (folder / "tokenizer.json").is_file():
        what = f"there is no tokenizer in {folder}; name the one that fits its model"
        raise ConfigError(absent("data.tokenizer", what, allowed="NAME or FOLDER"))
    return str(folder)


def with_model(config: RunConfig, prepared: Prepared, model: ModelFolder | None) -> Prepared:
    """The prepared data, with the model's folder for the ranks; ConfigError where they differ."""
    if model is None:
        return prepared
    from smolrun.models.huggingface_folder import check_fit, read_config

    check_fit(read_config(Path(model.folder)), config.model.name, prepared)
    return msgspec.structs.replace(prepared, model_folder=model.folder)


def prepare_data(config: RunConfig, progress: Progress) -> Prepared:
    """Make the data, and a model that has to be fetched, ready on this machine, or find it so."""
    _check_paths(config)
    model = prepare_model(config, progress)
    keys = config.data.keywords()
    if (tokenizer := tokenizer_for(config, model)) is not None:
        keys["tokenizer"] = tokenizer
    cache = cache_folder("data")
    prepared = load_target(config.data.target)(cache, **keys).prepare(progress)
    if not isinstance(prepared, Prepared):
        raise DataError(
            f"{config.data.target}: prepare() returned a {type(prepared).__name__}; it must return "
            "a smolrun.data.prepared.Prepared, which prepare_features and prepare_tokens give"
        )
    return with_model(config, prepared, model)


def _check_paths(config: RunConfig) -> None:
    """DataError where files of one's own are missing: that is known before a model is fetched."""
    if isinstance(config.data, TextFilesConfig):
        keys = config.data.keywords()
        load_target(config.data.target)(cache_folder("data"), **keys).files(lambda *_: None)
    elif isinstance(config.data, ChatConfig) and config.data.path.endswith(_FILES):
        path = Path(os.path.expanduser(config.data.path))
        if not path.exists():
            what = f"there is no file {path.absolute()}"
            raise DataError(f"data.path={config.data.path!r}: {what}")


def spec_of(config: RunConfig) -> DataSpec:
    """The sizes that the data gives a model, without preparing it. User code is the
    exception: only its prepared data has them.

    ConfigError where the model or its tokenizer cannot be had.
    """
    data = config.data
    if isinstance(data, CustomTargetConfig):
        own = prepare_data(config, lambda *_: None)
        return DataSpec(own.num_outputs, own.num_inputs, own.sequence_length)
    if data.produces == "features":
        return DataSpec(10, _PIXELS, None)
    model = config.model
    if hasattr(model, "pretrained"):  # its shape is enough: do not fetch weights for that
        model = model.model_copy(update={"pretrained": False})
    fetched = prepare_model(config.model_copy(update={"model": model}), lambda *_: None)
    vocabulary, notes = _vocabulary(config, tokenizer_for(config, fetched))
    return DataSpec(
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
