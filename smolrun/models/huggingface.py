"""model=hf: any causal language model of transformers, from a folder or from the hub.

The driver fetches it once (`prepare`), into the hub's own cache: the hub token never leaves the
driver. Every rank builds it from the folder, without any network (`build`). Imports torch only in
`build`.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smolrun.data.prepared import Progress
from smolrun.errors import ConfigError
from smolrun.models.base import ModelSpec
from smolrun.models.huggingface_folder import (
    ModelFolder,
    check_fit,
    fetched,
    gguf_refused,
    no_safetensors,
    read_config,
)

if TYPE_CHECKING:
    from smolrun.models.huggingface_network import HuggingFaceNetwork

Attention = Literal["auto", "eager", "sdpa"]
# What a model is, without its weights: no code, no pictures, no copies in other formats.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_NEVER = ("*/*",)  # files in folders are copies in other formats


def prepare(
    cache_dir: Path,
    progress: Progress,
    name: str,
    *,
    pretrained: bool,
    revision: str | None,
    attention: Attention,
    dropout: float,
) -> ModelFolder:
    """Makes the model `name` (a folder, or a name of the hub) ready on this machine.

    Hub models stay in the hub's own cache, where other programs find them too. Raises ConfigError
    with every problem of the model.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        if name.lower().endswith(".gguf"):
            raise ConfigError(gguf_refused(name, folder.name))
        if _is_path(name):
            raise ConfigError(f"model.name={name}: there is no such folder {folder.absolute()}")
        folder = download(name, revision, needs_weights=pretrained, progress=progress)
    return fetched(folder, name, needs_weights=pretrained)


def pinned_revision(name: str, revision: str | None) -> str | None:
    """`revision` as a commit of the hub, so that a resumed run gets the same files.

    Unchanged for a folder, for a commit, and where the hub does not answer.
    """
    if Path(os.path.expanduser(name)).is_dir() or _is_path(name) or is_commit(revision):
        return revision
    return commit_of(name, revision) or revision


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


def download(name: str, revision: str | None, *, needs_weights: bool, progress: Progress) -> Path:
    """The folder of the model `name`; what is there already is not fetched again.

    Without the hub, what an earlier run fetched is used. Raises ConfigError with what to do.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*_SMALL_FILES, *(["*.safetensors"] if needs_weights else [])]
    try:
        files = [
            str(item.rfilename)
            for item in HfApi().model_info(name, revision=revision).siblings or []
        ]
    except HFValidationError:
        raise ConfigError(f"model.name={name}: neither a folder nor a name of the hub") from None
    except Exception as error:  # no network, no such model, no right to it, a hub that is down
        return _fetched_before(name, revision, patterns, error)
    if needs_weights and not any(file.endswith(".safetensors") for file in files):
        raise ConfigError(no_safetensors(name, files))
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_NEVER),
            tqdm_class=_bar(f"fetching {name}", progress),
        )
    except Exception as error:
        raise ConfigError(_sentence(name, error)) from error
    return Path(folder)


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a branch, a tag or the newest state of a hub model is now.

    Without the hub, the one that an earlier run fetched. None where neither is known: `download`
    then says why.
    """
    from huggingface_hub import HfApi, snapshot_download

    with suppress(Exception):  # no network, no such model, no right to it, a hub that is down
        return HfApi().model_info(name, revision=revision).sha
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=["config.json"], local_files_only=True
        )
    except Exception:
        return None
    return Path(folder).name  # the hub's cache: .../snapshots/<commit>


def _fetched_before(name: str, revision: str | None, patterns: list[str], error: Exception) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        raise ConfigError(_sentence(name, error)) from error
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(_NEVER),
                local_files_only=True,
            )
        )
    except Exception:  # nothing there: the hub's first answer is the reason
        raise ConfigError(_sentence(name, error)) from error


def _sentence(name: str, error: Exception) -> str:
    """What went wrong at the hub, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        what = "its owner asks you to agree first; do so on its page, then `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        what = "the hub has no such model.revision"
    elif isinstance(error, RepositoryNotFoundError):
        what = (
            "there is no such folder, and the hub has no such model "
            "(a private one needs `hf auth login`)"
        )
    else:
        reason = str(error).strip().splitlines()
        what = (
            "there is no such folder, and the hub cannot be reached "
            f"({type(error).__name__}: {reason[0][:120] if reason else ''}); "
            "a folder that holds the model works without it"
        )
    return f"model.name={name}: {what}"


def _bar(what: str, progress: Progress) -> type[Any]:
    """A tqdm class for the hub's client that passes bytes to `progress` and draws nothing."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # it has no annotations

    class _ProgressBar(tqdm):  # type: ignore[misc]
        """Reports bytes; the bar that counts files reports nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})
            self._done, self._total = int(kwargs.get("initial") or 0), kwargs.get("total") or 0

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if self._counts_bytes:
                progress(what, self._done, max(self._done, int(self.total or self._total)))
            return None

    return _ProgressBar
