"""model=trained: the model of an earlier run, as its newest whole checkpoint has it.

Only finds and describes it; knows nothing of what is done with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from smolrun.checkpoints.run_names import locate
from smolrun.errors import CheckpointError
from smolrun.files import read_yaml

CONFIG_FILE = "config.yaml"


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
        """What the model was built with, beside name and target."""
        return {key: value for key, value in self.section.items() if key not in ("name", "target")}


def find(outputs: Path, warn: Callable[[str], None], *, run: str) -> TrainedModel:
    """The model that `run` means, as checkpoints/run_names.py reads it.

    Damaged checkpoints are skipped, each reported by `warn`. Raises CheckpointError where there is
    no whole one, or where the run's configuration cannot be read.
    """
    run_folder, checkpoint = locate(run, outputs, warn)
    path = run_folder / CONFIG_FILE
    try:
        config = msgspec.yaml.decode(read_yaml(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    section = config.get("model") if isinstance(config, dict) else None
    if not isinstance(section, dict) or not isinstance(section.get("target"), str):
        raise CheckpointError(f"{path} does not say which model was trained")
    return TrainedModel(run_folder, checkpoint, config)
