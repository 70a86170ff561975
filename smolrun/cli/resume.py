"""checkpoint.resume: the configuration of the run that is to go on, with what was typed on top.

So `smolrun checkpoint.resume=latest` needs no more words: everything else is as the run had it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from smolrun.checkpoints.find import run_folder, what_exists
from smolrun.config import resume
from smolrun.errors import CheckpointError, ConfigError

OUTPUTS = Path("outputs")
# An experiment sets many groups at once: with one, everything typed now counts, and is compared.
WHOLE = ("experiment",)


def resumed(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` as it is, or, where it asks to resume, what the run had, with `overrides` on top.

    ConfigError where there is no such run, and for every key that must not differ from it.
    """
    wanted = (data.get("checkpoint") or {}).get("resume")
    if not isinstance(wanted, str):
        return dict(data)
    try:
        stored = _stored(run_folder(wanted, OUTPUTS) / "config.yaml")
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.resume = {wanted}: {error}") from None
    stored = resume.completed(stored, data)
    keys = [line.partition("=")[0].lstrip("+~") for line in overrides]
    if any(key in WHOLE for key in keys):
        merged = dict(data)
    else:
        merged = resume.on_top(stored, data, [key.partition("@")[0] for key in keys])
    merged["checkpoint"]["resume"] = wanted
    if problems := list(resume.differences(stored, merged)):
        raise ConfigError(problems)
    return merged


def _stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is no run's folder{what_exists(OUTPUTS)}")
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
