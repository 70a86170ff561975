"""Which model task=serve, generate and chat serve, ready on this machine: from the package index,
the hub, a folder, or the checkpoint of an earlier run.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from smolrun.config import RunConfig
from smolrun.config.models import (
    PRETRAINED_NAMES,
    PRETRAINED_PARAMETERS,
    DecoderConfig,
    TrainedConfig,
)
from smolrun.driver.prepare import prepare_model
from smolrun.driver.resume import below_outputs
from smolrun.errors import ConfigError, SmolrunError
from smolrun.models.trained import (
    TrainedModel,
    find,
    is_network,
    network_folder,
    trained_model,
)
from smolrun.serving.source import ModelSource, source_of_checkpoint, source_of_folder
from smolrun.serving.text import has_template
from smolrun.tracking.run_folder import OUTPUTS

if TYPE_CHECKING:
    from smolrun.data.prepared import Progress

_SMALL = 1e9  # parameters; below them, what a model says is often wrong


def find_model(config: RunConfig, progress: Progress, say: Callable[[str], None]) -> ModelSource:
    """The configured model; ConfigError where it cannot be had, or is none that can be served."""
    model = config.model
    if isinstance(model, TrainedConfig):
        source = _trained(model.run, progress, say)
    elif isinstance(model, DecoderConfig):  # a shape whose weights are known
        source = _on_hub(PRETRAINED_NAMES[model.name], progress)
    else:
        pretrained = model.model_copy(update={"pretrained": True})
        found = prepare_model(config.model_copy(update={"model": pretrained}), progress)
        assert found is not None, "such models are fetched"
        source = source_of_folder(Path(found.folder), _short_name(model.name))
    if source.tokenizer_folder is None:
        raise ConfigError(_without_tokenizer(config, source))
    return source


def _without_tokenizer(config: RunConfig, source: ModelSource) -> str:
    if not isinstance(config.model, TrainedConfig):
        return (
            f"model={source.name}: {source.folder} has no tokenizer, so prompts cannot be read; "
            "put the tokenizer.json of the model there"
        )
    folder = below_outputs(Path(source.folder).parent.parent)
    return (
        f"model.run = {config.model.run}: there is no {folder / 'tokenizer' / 'tokenizer.json'}, "
        "so prompts cannot be read; copy that folder from the run as it was trained, or use the "
        f'model in Python: smolrun.load("{folder.as_posix()}")'
    )


def notes(source: ModelSource, free_bytes: float) -> Iterator[str]:
    """What to expect of a model that is small, or that is no chat model."""
    assert source.tokenizer_folder is not None, "find_model has refused that"
    if not has_template(Path(source.tokenizer_folder)):
        yield f"{source.name} is no chat model: it continues a text instead of answering"
    parameters = source.num_parameters(0, source.shape.layers - 1, True, True)
    if parameters > _SMALL or source.kind == "checkpoint":
        return
    line = f"{source.name} has {parameters / 1e6:.0f} million parameters: it invents facts"
    fitting = [name for name, size in PRETRAINED_PARAMETERS.items() if 2.5 * size <= free_bytes]
    yield f"{line}; model={fitting[-1]} would fit here and is better" if fitting else line


def example(source: ModelSource, url: str, *, needs_key: bool) -> str:
    """A first request for a shell: a question, or for a base model a text that it continues."""
    assert source.tokenizer_folder is not None, "find_model has refused that"
    place, asked = "completions", dict[str, object](prompt="Once upon a time")
    if has_template(Path(source.tokenizer_folder)):
        place, asked = "chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}
    body = shlex.quote(json.dumps({"model": source.name, **asked}))
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    return f"curl {url}/v1/{place} -H 'Content-Type: application/json'{key} -d {body}"


def _short_name(name: str) -> str:
    """A folder's own name; a name of the hub as it is."""
    folder = Path(os.path.expanduser(name))
    return folder.resolve().name if folder.is_dir() else name


def _on_hub(name: str, progress: Progress) -> ModelSource:
    from smolrun.models.huggingface import download

    return source_of_folder(download(name, None, needs_weights=True, progress=progress), name)


def _trained(run: str, progress: Progress, say: Callable[[str], None]) -> ModelSource:
    """The newest whole checkpoint of a run."""
    try:
        trained = find(OUTPUTS, say, run=run)
    except SmolrunError as error:
        raise ConfigError(f"model.run = {run}: {error}") from error
    return source_of_checkpoint(trained, trained.run_folder.name, _network(trained, progress))


def other_checkpoint(source: ModelSource, run_folder: Path, checkpoint: Path) -> ModelSource:
    """The model of `source` as another checkpoint of its run has it. CheckpointError, and
    ConfigError where that is of another architecture."""
    trained = trained_model(run_folder, checkpoint)
    found = source_of_checkpoint(trained, source.name, _network(trained, lambda *_: None))
    for key in ("family", "vocab_size", "shape"):
        if getattr(found, key) != getattr(source, key):
            raise ConfigError(f"it is of another architecture: its {key} has changed")
    return found


def _network(trained: TrainedModel, progress: Progress) -> Path | None:
    """Where the config.json of a trained model of transformers lies."""
    return network_folder(trained, progress) if is_network(trained) else None
