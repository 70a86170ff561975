"""model=hf: any causal language model of transformers, from a folder or from the hub.

The driver fetches it once (`prepare`); every rank builds it from the folder, without any network
(`build`). Knows torch only where it builds, so that the driver stays light.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smolrun.errors import ConfigError
from smolrun.models import hub
from smolrun.models.base import ModelSpec
from smolrun.models.huggingface_folder import Fetched, check_fit, fetched, read_config

if TYPE_CHECKING:
    from smolrun.models.huggingface_network import HuggingFaceNetwork

Progress = Callable[[str, int, int], None]
Attention = Literal["auto", "eager", "sdpa"]


def prepare(
    cache_dir: Path,
    progress: Progress,
    name: str,
    *,
    pretrained: bool,
    revision: str | None,
    attention: Attention,
    dropout: float,
) -> Fetched:
    """Makes the model `name` (a folder, or a name of the hub) ready on this machine.

    Hub models stay in the hub's own cache, where other programs find them too. Raises ConfigError
    with every problem of the model.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        if _is_path(name):
            raise ConfigError(f"model.name={name}: there is no such folder {folder.absolute()}")
        folder = hub.download(name, revision, needs_weights=pretrained, progress=progress)
    return fetched(folder, name, needs_weights=pretrained)


def pinned_revision(name: str, revision: str | None) -> str | None:
    """`revision` as a commit of the hub, so that a resumed run gets the same files.

    As it was for a folder, for a commit, and where the hub does not say.
    """
    if Path(os.path.expanduser(name)).is_dir() or _is_path(name) or is_commit(revision):
        return revision
    return hub.commit_of(name, revision) or revision


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state for ever, which branches and tags do not."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def build(
    spec: ModelSpec,
    *,
    pretrained: bool,
    revision: str | None,
    attention: Attention,
    dropout: float,
) -> HuggingFaceNetwork:
    """The model in `spec.model_folder`; under the meta device its shape only.

    Raises ConfigError where the folder is not what it must be, or does not fit the data.
    """
    if spec.model_folder is None:
        raise ConfigError("model=hf has no folder to load from; the driver must prepare it first")
    folder = Path(spec.model_folder)
    check_fit(read_config(folder), folder.name, spec)
    from smolrun.models.huggingface_network import load  # seconds: torch and transformers

    return load(folder, pretrained=pretrained, attention=attention, dropout=dropout)


def _is_path(name: str) -> bool:
    """Whether a name can only be a folder: the hub's are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
