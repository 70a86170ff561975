"""`smolrun.load(run)`: the model of a run in this process, with its trained weights, and its
tokenizer. Loading a model of the user's own imports and runs its code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import nn

from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.config.base import SHIPPED_TARGETS
from smolrun.data.prepared import Progress
from smolrun.data.tokenizer import FILE_NAME, TextTokenizer, load_tokenizer
from smolrun.errors import ConfigError
from smolrun.models.export import AVERAGE, MODEL
from smolrun.models.initialise import build_model
from smolrun.models.trained import TrainedModel, find, is_network, network_folder, sizes_of
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.replicas import model_tensors
from smolrun.targets import load_target
from smolrun.tracking.run_folder import OUTPUTS, RunFolder


def load(
    run: str | Path = "latest",
    *,
    outputs: str | Path = OUTPUTS,
    device: torch.device | str = "cpu",
    trust_run_folder: bool = False,
) -> tuple[nn.Module, TextTokenizer | None]:
    """The model that `run` means (latest, a run below `outputs`, or a folder), in eval mode, as its
    newest whole checkpoint has it (averaged, where the run averaged weights), and the tokenizer of
    its data, None where that is not text. `model(inputs)` returns logits, as in training.

    A SmolrunError says what cannot be loaded. A folder that this account did not write is refused
    where its model is code of its own, unless `trust_run_folder` is true.
    """
    trained = find(Path(outputs), warnings.warn, run=str(run))
    make = _code_of(trained, trust_run_folder=trust_run_folder)
    model = _built(trained, make, lambda *_: None).to(device)
    folder = trained.run_folder / "tokenizer"
    return model, load_tokenizer(folder) if (folder / FILE_NAME).is_file() else None


def _code_of(trained: TrainedModel, *, trust_run_folder: bool) -> Callable[..., nn.Module]:
    """What builds the model. ConfigError, before anything is imported, for code of its own that a
    folder of others names."""
    target = str(trained.section["target"])
    is_own = target not in SHIPPED_TARGETS
    reason = RunFolder(trained.run_folder).why_foreign() if is_own else None
    if reason is not None and not trust_run_folder:
        raise ConfigError(
            f"{trained.run_folder}: {reason}, and loading its model runs {target}; if you trust "
            "its author: smolrun.load(..., trust_run_folder=True)"
        )
    try:
        make: Callable[..., nn.Module] = load_target(target)
    except ConfigError as error:
        where = "; Python must find its module: start it in that folder, or extend sys.path"
        raise ConfigError(f"model.target = {error}{where if is_own else ''}") from error
    return make


def _built(trained: TrainedModel, make: Callable[..., nn.Module], progress: Progress) -> nn.Module:
    keys, folder = trained.keys, None
    if is_network(trained):
        keys, folder = {**keys, "pretrained": False}, str(network_folder(trained, progress))
    with CheckpointReader(trained.checkpoint) as checkpoint:
        spec = replace(sizes_of(checkpoint.manifest, trained), model_folder=folder)
        dtype = PRECISIONS[trained.config.get("precision", "float32")].parameters
        model = build_model(partial(make, spec, **keys), 0, dtype=dtype, device="cpu")
        tensors = {name: tensor.detach() for name, tensor in model_tensors(model)}
        slices = [TensorSlice.whole(MODEL + name, tensor) for name, tensor in tensors.items()]
        checkpoint.load(slices, all_of=MODEL)
        for name, tensor in tensors.items():
            if AVERAGE + name in checkpoint.manifest.tensors:
                tensor.copy_(checkpoint.read(AVERAGE + name))
    return model.eval()
