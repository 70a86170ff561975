"""task=export: a run's newest checkpoint as a Hugging Face folder that `from_pretrained` loads; a
model that Hugging Face has no class for, as one safetensors file and the lines that load it.

Only wiring, on the driver alone: no rank is started.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from smolrun.checkpoints.manifest import Manifest
from smolrun.config import RunConfig
from smolrun.config.models import TrainedConfig
from smolrun.driver.resume import below_outputs
from smolrun.errors import CheckpointError, ConfigError, SmolrunError
from smolrun.launch.supervisor_events import EXIT_DONE
from smolrun.models.trained import TrainedModel, find, is_network, network_folder, sizes_of
from smolrun.tracking.console import Console
from smolrun.tracking.run_folder import OUTPUTS, RunFolder

if TYPE_CHECKING:
    from smolrun.data.prepared import Progress

_DECODER = "smolrun.models.decoder"
_CARD = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("this folder")\n'
    'tokenizer = AutoTokenizer.from_pretrained("this folder")\n'
)
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


def drive(config: RunConfig) -> int:
    """Export as configured; ConfigError where nothing was written."""
    assert isinstance(config.model, TrainedConfig)  # config's own check
    console = Console(steps=1, world_size=1)
    try:
        trained = _found(console, config.model.run)
        kind = "huggingface" if _has_class(trained) else "safetensors"
        default = trained.run_folder / f"{kind}-{trained.checkpoint.name}"
        out = Path(config.export.out).expanduser() if config.export.out else default
        _refuse_used(out)
        with _whole_or_nothing(out) as folder:
            _write(trained, folder, config.export.dtype, console.preparing)
        for line in _result(trained, below_outputs(out)):
            console.say(line)
    finally:
        console.close()
    return EXIT_DONE


def _found(console: Console, run: str) -> TrainedModel:
    try:
        return find(OUTPUTS, console.say, run=run)
    except SmolrunError as error:
        raise ConfigError(f"model.run = {run}: {error}") from error


def _refuse_used(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"export.out = {out}: there is something already, and export overwrites nothing; "
            "name a new folder by export.out=FOLDER"
        )


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or is gone."""
    workshop = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    try:
        workshop.mkdir(parents=True)
        yield workshop
        if out.is_dir():
            out.rmdir()  # it is empty, as was seen
        os.rename(workshop, out)
    except OSError as error:
        raise ConfigError(f"export.out = {out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _write(trained: TrainedModel, folder: Path, dtype: str, progress: Progress) -> None:
    from smolrun.checkpoints.reader import CheckpointReader  # torch: seconds
    from smolrun.models import export

    tokenizer = trained.run_folder / "tokenizer"
    card = _CARD
    with CheckpointReader(trained.checkpoint) as checkpoint:
        if trained.module == _DECODER:
            written = export.write_decoder(checkpoint, trained.keys, folder, dtype, progress)
        elif is_network(trained):
            source = network_folder(trained, progress)
            export.write_network(checkpoint, source, folder, dtype, progress)
        else:
            card = _own_card(trained, checkpoint.manifest, dtype)
            export.write_own(checkpoint, folder, dtype, progress)
    end_id = None
    if (tokenizer / "tokenizer.json").is_file():
        end_id = export.write_tokenizer(tokenizer, folder)
    if trained.module == _DECODER:
        export.write_end_token(folder, written, end_id)
    if _has_class(trained):
        progress("checking that it loads", 0, 1)
        export.check_loads(folder)
        progress("checking that it loads", 1, 1)
    (folder / "README.md").write_text(_card(trained, card), encoding="utf-8")


def _has_class(trained: TrainedModel) -> bool:
    """Whether Hugging Face has a class for it."""
    return trained.module == _DECODER or is_network(trained)


def _result(trained: TrainedModel, out: Path) -> Iterator[str]:
    yield f"{out}: {_said(trained)}"
    if _has_class(trained):
        yield f'to load it: transformers.AutoModelForCausalLM.from_pretrained("{out.as_posix()}")'
    else:
        yield f"to load it: the lines in {out / 'README.md'}, which load model.safetensors"


def _own_card(trained: TrainedModel, manifest: Manifest, dtype: str) -> str:
    """Python that builds the model and loads its numbers, for the folder that it is in."""
    target, keys = str(trained.section["target"]), trained.keys
    try:
        sizes = sizes_of(manifest, trained)
    except CheckpointError as error:
        raise ConfigError(f"model.run: {error}") from None
    if not (_TARGET.fullmatch(target) and all(key.isidentifier() for key in keys)):
        raise ConfigError(f"{trained.run_folder}: model.target = {target} names no code")
    module, _, name = target.partition(":")
    spec = ", ".join(f"{key}={value!r}" for key, value in msgspec.structs.asdict(sizes).items())
    arguments = "".join(f", {key}={value!r}" for key, value in keys.items())
    is_double = dtype == "as_is" and trained.config.get("precision") == "float64"
    return (
        "from types import SimpleNamespace\n"
        "from safetensors.torch import load_model\n"
        f"from {module} import {name}\n\n"
        f"model = {name}(SimpleNamespace({spec}){arguments}){'.double()' if is_double else ''}\n"
        'load_model(model, "model.safetensors")\n'
    )


def _said(trained: TrainedModel) -> str:
    return f"{trained.section.get('name')} of {trained.run_folder.name}, {trained.checkpoint.name}"


def _card(trained: TrainedModel, loader: str) -> str:
    """README.md: what was trained, on what, how, and how to load it."""
    config, summary = trained.config, RunFolder(trained.run_folder).summary()
    training = config.get("training") or {}
    step = int(trained.checkpoint.name.partition("-")[2].partition(".")[0] or 0)
    facts = {
        "model": trained.section.get("name"),
        "data": (config.get("data") or {}).get("name"),
        "steps": f"{step} of {training.get('steps')}",
        "sequences per step": training.get("global_batch_size"),
        "algorithm": (config.get("algorithm") or {}).get("name"),
        "ranks": summary.get("world_size"),
        "precision": config.get("precision"),
        "seed": config.get("seed"),
        "training loss at the run's end": summary.get("final_train_loss"),
        "evaluation loss at the run's end": summary.get("final_eval_loss"),
        "run": trained.run_folder.name,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    kind = "library_name: transformers\npipeline_tag: text-generation\n"
    return (
        f"---\n{kind if _has_class(trained) else ''}tags: [smolrun]\n---\n\n"
        f"# {trained.section.get('name')}\n\nTrained with smolrun.\n\n" + "\n".join(lines) + "\n\n"
        f"```python\n{loader}```\n"
    )
