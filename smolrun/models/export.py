"""Writes a checkpoint's model as a Hugging Face folder: config.json, safetensors, tokenizer; or,
where Hugging Face has no class for it, as one safetensors file.

Tensors are read one by one and written file by file, so a model needs the memory of one file only.
Knows nothing of runs beside their model's section of the configuration.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from smolrun.checkpoints.reader import CheckpointReader
from smolrun.data.prepared import Progress
from smolrun.errors import ConfigError
from smolrun.files import MAX_TOKENIZER_BYTES, read_json
from smolrun.models.huggingface_conversion import config_of, family_of, location_of, to_huggingface
from smolrun.models.shape import DecoderShape, completed_shape

MODEL = "model/"  # what checkpoints put in front of a parameter's name
AVERAGE = "average/"  # and in front of its average, where the run kept one
NETWORK = "network."  # what model=hf puts in front of transformers' names
MOST_FILE_BYTES = 4_000_000_000
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
END_TOKEN = "<|endoftext|>"


def shape_of(keys: Mapping[str, Any]) -> DecoderShape:
    """Our decoder's shape from the keys that a run was configured with."""
    try:
        return completed_shape(**{key: value for key, value in keys.items() if key != "vocab_size"})
    except TypeError as error:
        raise ConfigError(
            f"the run was configured for another version of smolrun's decoder ({error})"
        ) from None


def write_decoder(
    checkpoint: CheckpointReader,
    keys: Mapping[str, Any],
    folder: Path,
    dtype: str,
    progress: Progress,
) -> dict[str, Any]:
    """Our own decoder as the family of transformers that it is; returns its config.json."""
    names = [key.removeprefix(MODEL) for key in checkpoint.keys(MODEL)]
    vocab_size = checkpoint.shape(f"{MODEL}token_embedding.weight")[0]
    shape = shape_of(keys)
    family = family_of(shape)
    ours: dict[str, list[str]] = {}
    for name in names:
        ours.setdefault(location_of(name, family).name, []).append(name)

    def reader(parts: list[str]) -> Callable[[], Tensor]:
        def read() -> Tensor:
            values = {name: trained_value(checkpoint, MODEL + name) for name in parts}
            (tensor,) = to_huggingface(values, family).values()
            return tensor

        return read

    tensors = {name: reader(parts) for name, parts in ours.items()}
    written = write_tensors(tensors, folder, dtype, progress)
    config = config_of(shape, vocab_size, written)
    write_json(folder / "config.json", config)
    return config


def write_network(
    checkpoint: CheckpointReader, source: Path, folder: Path, dtype: str, progress: Progress
) -> dict[str, Any]:
    """A model of transformers, with the config.json it was built from; returns that."""
    keys = [key for key in checkpoint.keys(MODEL) if key.startswith(MODEL + NETWORK)]

    def reader(key: str) -> Callable[[], Tensor]:
        return lambda: trained_value(checkpoint, key)

    tensors = {key.removeprefix(MODEL + NETWORK): reader(key) for key in keys}
    written = write_tensors(tensors, folder, dtype, progress)
    config = read_json(source / "config.json")
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    config["dtype"] = written
    write_json(folder / "config.json", config)
    generation = source / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())
    return config


def write_own(checkpoint: CheckpointReader, folder: Path, dtype: str, progress: Progress) -> None:
    """Any model as one model.safetensors, by the names of its state_dict. Needs memory for the
    whole model, and none of its code."""
    keys = checkpoint.keys(MODEL)
    tensors = {key.removeprefix(MODEL): partial(trained_value, checkpoint, key) for key in keys}
    write_tensors(tensors, folder, dtype, progress, most_bytes=sys.maxsize)


def trained_value(checkpoint: CheckpointReader, key: str) -> Tensor:
    """The averaged parameter (EMA), where there is one: the run evaluated it."""
    average = AVERAGE + key.removeprefix(MODEL)
    return checkpoint.read(average if average in checkpoint.manifest.tensors else key)


def write_tensors(
    tensors: Mapping[str, Callable[[], Tensor]],
    folder: Path,
    dtype: str,
    progress: Progress,
    most_bytes: int = MOST_FILE_BYTES,
) -> str:
    """model.safetensors, or several files and their index where one would be too large.

    Each tensor is read when it is its turn. Returns the name of their type, as in config.json.
    """
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0
    kinds: set[torch.dtype] = set()

    def flush() -> None:
        path = folder / f"part-{len(files)}"
        path.touch()
        mode = path.stat().st_mode  # by the user's umask; save_file would leave 0600
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(mode)
        files.append(list(pending))
        pending.clear()

    for done, (name, read) in enumerate(tensors.items(), start=1):
        tensor = read()
        if dtype != "as_is" and tensor.is_floating_point():
            tensor = tensor.to(_DTYPES[dtype])
        if tensor.is_floating_point():
            kinds.add(tensor.dtype)
        if pending and pending_bytes + tensor.nbytes > most_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor.contiguous()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
        progress("writing the model", done, len(tensors))
    flush()
    _name_files(folder, files, total)
    widest = max(kinds, key=lambda kind: kind.itemsize)
    return str(widest).removeprefix("torch.")


def _name_files(folder: Path, files: list[list[str]], total: int) -> None:
    """Rename the files to their final names, which contain their number."""
    if len(files) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(source: Path, folder: Path) -> int | None:
    """Copies the run's tokenizer; one of ours gets the file that makes transformers read it.

    Returns the id of our end token, None where there is none or the tokenizer is not ours.
    """
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    if (folder / "tokenizer_config.json").exists():
        return None
    content = read_json(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    ids = {item["content"]: int(item["id"]) for item in content.get("added_tokens", [])}
    end_id = ids.get(END_TOKEN)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    end = {"eos_token": END_TOKEN} if end_id is not None else {}
    write_json(folder / "tokenizer_config.json", settings | end)
    return end_id


def write_end_token(folder: Path, config: dict[str, Any], end_id: int | None) -> None:
    """Lets `generate` know where a text of our own decoder ends."""
    write_json(folder / "config.json", config | {"eos_token_id": end_id})
    generation = {"_from_model_config": True, "eos_token_id": end_id, "pad_token_id": end_id}
    write_json(folder / "generation_config.json", generation)


def check_loads(folder: Path) -> None:
    """Raises ConfigError unless transformers' class has exactly the tensors that were written. One
    with experts is loaded for that, as transformers joins their matrices while it loads them."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    if "num_experts_per_tok" in read_json(folder / "config.json"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it lists them; else it raises an error of its own
        )
        keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
        _refuse_misfits(loaded[0], *(sorted(map(str, loaded[1][key])) for key in keys))
        return
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: list(value.shape) for name, value in model.named_parameters()}
    wrong = sorted(name for name in wanted if found.get(name) != wanted[name])
    unknown = sorted(set(found) - set(model.state_dict()))
    _refuse_misfits(model, wrong, unknown)


def _refuse_misfits(
    model: object, wrong: list[str], unknown: list[str], mismatched: Sequence[str] = ()
) -> None:
    wrong = [*wrong, *mismatched]
    if wrong or unknown:
        name = (wrong or unknown)[0]
        raise ConfigError(
            f"{type(model).__name__} does not fit the checkpoint: {name} "
            f"({len(wrong)} tensors missing or of another shape, {len(unknown)} unknown)"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readable, with a line at the end."""
    text = json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
