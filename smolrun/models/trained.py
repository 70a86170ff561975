"""model=trained: the model of an earlier run, as its newest whole checkpoint has it.

Only finds and describes it; knows nothing of what is done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from smolrun.checkpoints.manifest import Manifest
from smolrun.checkpoints.run_names import locate
from smolrun.data.cache import cache_folder
from smolrun.data.prepared import Count, Progress
from smolrun.errors import CheckpointError
from smolrun.files import read_yaml
from smolrun.targets import model_keywords

CONFIG_FILE = "config.yaml"
NETWORKS = ("smolrun.models.huggingface", "smolrun.models.smollm2")  # code of transformers
SIZES = ("num_outputs", "num_inputs", "sequence_length")  # of the data, in every checkpoint


class ModelSizes(msgspec.Struct, frozen=True):
    """What a model is built for; fits `smolrun.models.base.ModelSpec`."""

    num_outputs: Count
    num_inputs: Count | None
    sequence_length: Count | None
    model_folder: str | None = None


@dataclass(frozen=True)
class TrainedModel:
    """A run's folder, one of its checkpoints, and the resolved configuration it was trained by."""

    run_folder: Path
    checkpoint: Path
    config: dict[str, Any]

    @property
    def section(self) -> dict[str, Any]:
        """The configuration of the model."""
        section: dict[str, Any] = self.config["model"]
        return section

    @property
    def keys(self) -> dict[str, Any]:
        """What the model was built with."""
        return model_keywords(self.section)

    @property
    def module(self) -> str:
        """The module of its code."""
        return str(self.section["target"]).partition(":")[0]


def find(outputs: Path, warn: Callable[[str], None], *, run: str) -> TrainedModel:
    """The model that `run` means, as checkpoints/run_names.py reads it.

    Damaged checkpoints are skipped, each reported by `warn`. Raises CheckpointError where there is
    no whole one, or where the run's configuration cannot be read.
    """
    return trained_model(*locate(run, outputs, warn))


def trained_model(run_folder: Path, checkpoint: Path) -> TrainedModel:
    """A checkpoint of a run with its configuration; CheckpointError where that cannot be read."""
    path = run_folder / CONFIG_FILE
    try:
        config = msgspec.yaml.decode(read_yaml(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    section = config.get("model") if isinstance(config, dict) else None
    if not isinstance(section, dict) or not isinstance(section.get("target"), str):
        raise CheckpointError(f"{path} does not say which model was trained")
    return TrainedModel(run_folder, checkpoint, config)


def is_network(trained: TrainedModel) -> bool:
    """Whether its code is that of transformers."""
    return trained.module in NETWORKS


def network_folder(trained: TrainedModel, progress: Progress) -> Path:
    """Where the config.json of such a model lies: the run keeps it, or it is fetched."""
    kept = trained.run_folder / "model"
    if (kept / "config.json").is_file():
        return kept
    keys = {**trained.keys, "pretrained": False}  # its values come from the checkpoint
    prepare = import_module(trained.module).prepare
    found = prepare(cache_folder("models"), progress, trained.section["name"], **keys)
    return Path(found.folder)


def sizes_of(manifest: Manifest, trained: TrainedModel) -> ModelSizes:
    """As the checkpoint has them; CheckpointError for one of an older version."""
    data = manifest.state.get("data")
    found = {name: data.get(name) for name in SIZES} if isinstance(data, Mapping) else {}
    if found.get("num_outputs") is None:
        raise CheckpointError(
            f"{trained.checkpoint} was saved by an older version of smolrun, which did not keep "
            "the sizes of the data; resume the run for a step, and the next checkpoint has them: "
            f"smolrun checkpoint.resume={trained.run_folder.name} training.steps=N"
        )
    try:
        return msgspec.convert(found, ModelSizes)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{trained.checkpoint}: its state is damaged: {error}") from None
