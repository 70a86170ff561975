"""A model that has to be fetched: the driver does it, once, before anything starts.

Also decides whose tokenizer the data uses, and looks whether model and data fit each other.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING

from smolrun.config import RunConfig
from smolrun.config.base import CustomTargetConfig
from smolrun.config.models import HuggingFaceConfig
from smolrun.data.cache import cache_folder
from smolrun.errors import ConfigError

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared, Progress
    from smolrun.models.huggingface_folder import ModelFolder


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


def with_model(config: RunConfig, prepared: Prepared, model: ModelFolder | None) -> Prepared:
    """The prepared data, with the model's folder for the ranks; ConfigError where they differ."""
    if model is None:
        return prepared
    from pathlib import Path

    from smolrun.models.huggingface_folder import check_fit, read_config

    check_fit(read_config(Path(model.folder)), config.model.name, prepared)
    return dataclasses.replace(prepared, model_folder=model.folder)
