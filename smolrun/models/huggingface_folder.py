"""A Hugging Face model folder, checked before anything is loaded: complete, safe, fitting the data.

Knows no torch and no transformers, so that the driver reports every problem at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from smolrun.errors import ConfigError
from smolrun.files import decode_json, read_json
from smolrun.models.base import ModelSpec

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
# Any of these is a tokenizer; data.tokenizer makes a tokenizer.json of the older ones.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
WEIGHTS = "*.safetensors"
# The table of contents at the start of a file: 100 to 200 bytes a tensor. safetensors itself reads
# up to 100 MB, which as JSON fills gigabytes.
_MAX_HEADER_BYTES = 16 << 20
_MAX_INDEX_BYTES = 64 << 20  # of all tensors of a model: 9 MB for one of 90,000


@dataclass(frozen=True)
class ModelFolder:
    """A model that is ready on this machine.

    `tokenizer_folder` is where its tokenizer lies (None: it brings none that can be read). `sha256`
    identifies the model: of config.json and the names, sizes and headers of the weights.
    """

    folder: str
    tokenizer_folder: str | None
    sha256: str


def fetched(folder: Path, name: str, *, needs_weights: bool) -> ModelFolder:
    """The model in a folder; raises ConfigError with every problem of it."""
    problems = list(_problems(folder, name, needs_weights))
    if problems:
        raise ConfigError(problems)
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for path in weight_files(folder) if needs_weights else []:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + _header(path))
    path = folder.resolve()
    return ModelFolder(str(path), str(path) if has_tokenizer else None, digest.hexdigest())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is; raises ConfigError where it is missing or no JSON object."""
    try:
        return _read_object(folder / CONFIG_FILE)
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a model folder: it has no {CONFIG_FILE}") from None


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json as it is, empty where there is none; raises ConfigError where it is no
    JSON object."""
    try:
        return _read_object(folder / GENERATION_FILE)
    except FileNotFoundError:
        return {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, in the order of their names."""
    return sorted(folder.glob(WEIGHTS))


class StoredTensor(NamedTuple):
    """Where a tensor lies, its type as safetensors names it (F32, BF16, ...) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model by name, from the tables of contents alone.

    Of several files an index says which belong to the model: beside them may lie copies in other
    formats. Raises ConfigError for a damaged file.
    """
    names = _indexed(folder) or {path.name for path in weight_files(folder)}
    if "model.safetensors" in names:
        names = {"model.safetensors"}
    found = {}
    for name in sorted(names):
        entries = decode_json(_header(folder / name))
        entries.pop("__metadata__", None)
        for tensor, entry in entries.items():
            found[tensor] = StoredTensor(folder / name, entry["dtype"], tuple(entry["shape"]))
    return found


def end_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """The ids of tokens that end a text: of generation_config.json and of config.json. Raises
    ConfigError where they are no ids."""
    ids: set[int] = set()
    for section in (read_generation_config(folder), config):
        value = section.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int for one in listed):
            raise ConfigError(f"{folder}: eos_token_id = {value!r} is not an id of a token")
        ids.update(listed)
    return sorted(ids)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Token ids the model knows, padding included; None where config.json has no such key."""
    return _number(config, "vocab_size")


def longest_sequence(config: Mapping[str, Any]) -> int | None:
    """Tokens the model can read at once; None where it has no such limit."""
    return _number(config, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def check_fit(config: Mapping[str, Any], name: str, spec: ModelSpec) -> None:
    """Raises ConfigError with every reason why the model cannot learn from this data."""
    if spec.sequence_length is None:
        raise ConfigError(
            f"model.name={name} reads tokens, but the data gives features; "
            "use data=python_stdlib or data=text"
        )
    problems = []
    if config.get("quantization_config") or config.get("quantization"):
        problems.append(
            f"model.name={name}: its weights are quantized, which cannot be trained; "
            "take the model they were made from"
        )
    vocabulary, longest = vocabulary_size(config), longest_sequence(config)
    if vocabulary is not None and spec.num_outputs > vocabulary:
        problems.append(
            f"tokenizer and model disagree: the tokenizer has {spec.num_outputs} tokens, but "
            f"model.name={name} knows {vocabulary}; use the model's own (data.tokenizer=auto)"
        )
    if longest is not None and spec.sequence_length > longest:
        problems.append(
            f"data.sequence_length={spec.sequence_length} is more than model.name={name} can read "
            f"({longest} tokens); lower it"
        )
    if problems:
        raise ConfigError(problems)


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of `keys` that is a number; models that also see keep theirs in `text_config`."""
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, Mapping) else {}):
        for key in keys:
            if isinstance(section.get(key), int):
                return int(section[key])
    return None


def _problems(folder: Path, name: str, needs_weights: bool) -> Iterator[str]:
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs and not (folder / CONFIG_FILE).exists():
        yield gguf_refused(name, ggufs[0])
        return
    config = read_config(folder)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        yield f"{folder / CONFIG_FILE} has no model_type: it is not a model of transformers"
        return
    if "auto_map" in config and not _is_known(kind):
        yield (
            f"model.name={name}: model_type={kind!r} needs Python code that comes with the "
            "weights, and smolrun runs no code of a model; take a model that transformers has "
            "a class for"
        )
    elif not _looks_causal(config) and not _is_known(kind):
        yield (
            f"model.name={name}: transformers has no class that writes text for model_type={kind!r}"
        )
    if needs_weights:
        yield from _weight_problems(folder, name)


def _looks_causal(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or []
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _is_known(kind: str) -> bool:
    """Imports transformers (seconds), so it is called only where the files do not decide."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _weight_problems(folder: Path, name: str) -> Iterator[str]:
    files = weight_files(folder)
    if not files:
        yield no_safetensors(name, sorted(path.name for path in folder.glob("*")))
    missing = _indexed(folder) - {path.name for path in files}
    if missing:
        yield f"{folder} is not whole: {', '.join(sorted(missing))} is missing"
    for path in files:
        try:
            _header(path)
        except ConfigError as error:
            yield str(error)


def no_safetensors(name: str, files: list[str]) -> str:
    """Why there is nothing to load, and how to make it."""
    if ggufs := [file for file in files if file.lower().endswith(".gguf")]:
        return gguf_refused(name, ggufs[0])
    pickled = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not pickled:
        return (
            f"model.name={name} has no weights (*.safetensors); model.pretrained=false needs none"
        )
    return (
        f"model.name={name} has its weights in {pickled[0]} only, a format that can run any code; "
        "smolrun reads safetensors. If you trust it, convert it in Python: "
        f"transformers.AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained('FOLDER'), "
        "then model.name=FOLDER"
    )


def gguf_refused(name: str, file: str) -> str:
    """Why a GGUF file is not read, and how to make what is."""
    folder = str(Path(name).parent) if name.lower().endswith(".gguf") else name
    options = f"({folder!r}, gguf_file={file!r}).save_pretrained('FOLDER')"
    return (
        f"model.name={name}: {file} is GGUF, which is not read. Convert it in Python, with the "
        f"packages gguf and accelerate: transformers.AutoModelForCausalLM.from_pretrained{options} "
        f"and transformers.AutoTokenizer.from_pretrained{options}; then model=hf "
        "model.name=FOLDER, with serving.weights=int4 to serve it as small"
    )


def _indexed(folder: Path) -> set[str]:
    """The files that an index of several promises."""
    path = folder / "model.safetensors.index.json"
    try:
        places = read_json(path, _MAX_INDEX_BYTES)["weight_map"]
        return {str(file) for file in places.values()}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def _header(path: Path) -> bytes:
    """A safetensors file's table of contents; ConfigError where the file is not as long as that
    says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ConfigError(f"{path} is damaged: it is not a safetensors file")
        if length > _MAX_HEADER_BYTES:
            raise ConfigError(
                f"{path}: its table of contents has {length:,} bytes, the limit is "
                f"{_MAX_HEADER_BYTES >> 20} MiB"
            )
        header = file.read(length)
    try:
        entries = decode_json(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ConfigError(f"{path} is damaged: its table of contents cannot be read") from None
    if size != expected:
        raise ConfigError(f"{path} is damaged: it has {size} bytes, expected {expected}")
    return header
