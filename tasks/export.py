"""task=export: a run's newest checkpoint as a Hugging Face folder that `from_pretrained` loads.

Only wiring, on the driver alone: no rank is started.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from smolrun.config import RunConfig
from smolrun.config.models import TrainedConfig
from smolrun.data.cache import cache_folder
from smolrun.errors import ConfigError, SmolrunError
from smolrun.launch.supervisor_events import EXIT_DONE
from smolrun.models.trained import TrainedModel, find
from smolrun.tracking.console import Console
from smolrun.tracking.run_folder import OUTPUTS, RunFolder

if TYPE_CHECKING:
    from smolrun.data.prepared import Progress

_DECODER = "smolrun.models.decoder"
_NETWORKS = ("smolrun.models.huggingface", "smolrun.models.smollm2")


def drive(config: RunConfig) -> int:
    """Export as configured; ConfigError where nothing was written."""
    assert isinstance(config.model, TrainedConfig)  # config's own check
    console = Console(steps=1, world_size=1)
    try:
        trained = _found(console, config.model.run)
        default = trained.run_folder / f"huggingface-{trained.checkpoint.name}"
        out = Path(config.export.out).expanduser() if config.export.out else default
        _refuse_used(out)
        with _whole_or_nothing(out) as folder:
            _write(trained, folder, config.export.dtype, console.preparing)
        console.say(f"{out}: {_said(trained)}, for AutoModelForCausalLM.from_pretrained")
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

    module = str(trained.section["target"]).partition(":")[0]
    tokenizer = trained.run_folder / "tokenizer"
    with CheckpointReader(trained.checkpoint) as checkpoint:
        if module == _DECODER:
            written = export.write_decoder(checkpoint, trained.keys, folder, dtype, progress)
        elif module in _NETWORKS:
            source = _source(trained, module, progress)
            export.write_network(checkpoint, source, folder, dtype, progress)
        else:
            raise ConfigError(_no_class(trained, module))
    end_id = None
    if (tokenizer / "tokenizer.json").is_file():
        end_id = export.write_tokenizer(tokenizer, folder)
    if module == _DECODER:
        export.write_end_token(folder, written, end_id)
    export.check_loads(folder)
    (folder / "README.md").write_text(_card(trained), encoding="utf-8")


def _source(trained: TrainedModel, module: str, progress: Progress) -> Path:
    """Where the config.json of a model of transformers lies: the run keeps it, or it is fetched."""
    kept = trained.run_folder / "model"
    if (kept / "config.json").is_file():
        return kept
    cache = cache_folder("models")
    keys = {**trained.keys, "pretrained": False}  # its values come from the checkpoint
    prepare = import_module(module).prepare
    return Path(prepare(cache, progress, trained.section["name"], **keys).folder)


def _no_class(trained: TrainedModel, module: str) -> str:
    name = trained.section.get("name")
    if module == "smolrun.models.mlp":
        return (
            f"the run trained model={name}, for which Hugging Face has no class: only models that "
            "write text can be exported; its numbers are safetensors files in "
            f"{trained.checkpoint}"
        )
    return (
        f"the run trained your own model ({trained.section['target']}), for which Hugging Face "
        f"has no class; its numbers are safetensors files in {trained.checkpoint}"
    )


def _said(trained: TrainedModel) -> str:
    return f"{trained.section.get('name')} of {trained.run_folder.name}, {trained.checkpoint.name}"


def _card(trained: TrainedModel) -> str:
    """README.md: what was trained, on what, how, and how to load it."""
    config, summary = trained.config, RunFolder(trained.run_folder).summary()
    training = config.get("training") or {}
    step = int(trained.checkpoint.name.partition("-")[2].partition(".")[0] or 0)
    facts = {
        "model": trained.section.get("name"),
        "data": (config.get("data") or {}).get("name"),
        "steps": f"{step} of {training.get('steps')}",
        "sequences per step": training.get("global_batch_size"),
        "algorithm": f"{(config.get('algorithm') or {}).get('name')}, "
        f"{summary.get('world_size', '?')} ranks",
        "precision": config.get("precision"),
        "seed": config.get("seed"),
        "training loss at the run's end": summary.get("final_train_loss"),
        "evaluation loss at the run's end": summary.get("final_eval_loss"),
        "run": trained.run_folder.name,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [smolrun]\n---\n\n"
        f"# {trained.section.get('name')}\n\nTrained with smolrun.\n\n" + "\n".join(lines) + "\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this folder")\n```\n'
    )
