"""What is served: where a model's weights are, what it is, and reading one stage's share of them.

    Hugging Face folder   config.json, *.safetensors         source_of_folder
    a run's checkpoint    model/<name>, or its average       source_of_checkpoint
    parts                 <sha256>/layer-3.safetensors       made of either, for hosts of a pipeline

The driver makes a ModelSource from files' headers alone, without torch; ranks get it as JSON and
read their own tensors, one at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from smolrun.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from smolrun.data.tokenizer import load_tokenizer
from smolrun.errors import ConfigError
from smolrun.models.huggingface_conversion import (
    TensorLocation,
    decoder_keys_from_hf,
    from_huggingface,
    location_of,
)
from smolrun.models.huggingface_folder import end_ids, fetched, read_config, stored_tensors
from smolrun.models.shape import DecoderShape, completed_shape, parameter_shapes
from smolrun.models.trained import TrainedModel, is_network
from smolrun.serving.messages import ServingDtype
from smolrun.serving.weight_types import (
    GROUP_SIZE,
    mlx_type,
    quantized,
    stored_as,
    tensor_names,
)

if TYPE_CHECKING:
    from torch import Tensor

    from smolrun.checkpoints.reader import CheckpointReader

OURS = "smolrun"  # the family whose parameters have the names of models/decoder.py
_DECODER = "smolrun.models.decoder"
_MODEL, _NETWORK = "model/", "network."  # before the names in a checkpoint

Progress = Callable[[int, int], None]


class ModelSource(msgspec.Struct, frozen=True):
    """A model that can be served.

    `family` says how tensors are called in its files. `dtype` is the narrowest type that holds all
    their values, `group_size` that of weights in int4. `end_ids` are the tokens that end a text;
    `tokenizer_folder` is on the driver.
    """

    name: str
    kind: Literal["huggingface", "checkpoint", "parts"]
    folder: str
    family: str
    shape: DecoderShape
    vocab_size: int
    dtype: ServingDtype
    end_ids: list[int]
    tokenizer_folder: str | None
    parts: dict[str, str] = {}  # name -> sha256 of its bytes, which is the name of its folder
    group_size: int = GROUP_SIZE
    step: int = 0  # of the checkpoint, 0 for what is none

    def parameter_shapes(
        self, first_layer: int, last_layer: int, has_embedding: bool, has_head: bool
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters of a stage."""
        ends = (has_embedding, has_head)
        return parameter_shapes(self.shape, self.vocab_size, first_layer, last_layer, *ends)

    def num_parameters(
        self, first_layer: int, last_layer: int, has_embedding: bool, has_head: bool
    ) -> int:
        """Elements of the parameters of a stage; a tied embedding counts once."""
        shapes = self.parameter_shapes(first_layer, last_layer, has_embedding, has_head)
        return sum(map(math.prod, shapes.values()))


def source_of_folder(folder: Path, name: str) -> ModelSource:
    """The source of a Hugging Face folder.

    Reads config.json and headers only. Raises ConfigError with every problem: files or tensors
    that are missing or of another shape, a family that our decoder cannot be.
    """
    ready = fetched(folder, name, needs_weights=True)
    config, shape = _config(folder, name)
    stored = {key: (entry.dtype, entry.shape) for key, entry in stored_tensors(folder).items()}
    shapes = {key: shape for key, (_, shape) in stored.items()}
    quantized_as = mlx_type(config, name)
    source = ModelSource(
        name=name,
        kind="huggingface",
        folder=ready.folder,
        family=config["model_type"],
        shape=shape,
        vocab_size=config["vocab_size"],
        dtype=(
            quantized_as[0] if quantized_as else _narrowest(dtype for dtype, _ in stored.values())
        ),
        end_ids=end_ids(folder, config),
        tokenizer_folder=ready.tokenizer_folder,
        group_size=quantized_as[1] if quantized_as else GROUP_SIZE,
    )
    _check_shapes(source, _logical_shapes(source, stored) if quantized_as else shapes)
    return source


def source_of_checkpoint(
    trained: TrainedModel, name: str, network_folder: Path | None = None
) -> ModelSource:
    """The source of a run's checkpoint, of whatever algorithm.

    `network_folder` has the config.json of the model of transformers that was trained, unless the
    run keeps it. Raises ConfigError where the run trained no model that writes text.
    """
    from smolrun.checkpoints.reader import CheckpointReader  # torch: seconds

    tokenizer: Path | None = trained.run_folder / "tokenizer"
    ids: list[int] = []
    with CheckpointReader(trained.checkpoint) as checkpoint:
        if trained.module == _DECODER:
            family, shape = OURS, _shape_of_run(trained)
            vocab_size = checkpoint.shape(f"{_MODEL}token_embedding.weight")[0]
            prefix = _MODEL
        elif is_network(trained):
            config, shape = _config(_config_folder(trained, network_folder), name)
            family, vocab_size = config["model_type"], config["vocab_size"]
            ids = end_ids(_config_folder(trained, network_folder), config)
            prefix = _MODEL + _NETWORK
        else:
            raise ConfigError(
                f"model {name}: the run trained {trained.section['target']}; only models that "
                "write text can be served: our decoder (model=gpt_tiny, ...) and model=hf"
            )
        keys = checkpoint.keys(prefix)
        shapes = {key.removeprefix(prefix): checkpoint.shape(key) for key in keys}
        dtype = _narrowest(checkpoint.manifest.tensors[key].dtype for key in keys)
        step = checkpoint.manifest.step
    if tokenizer is not None and not (tokenizer / TOKENIZER_FILE).is_file():
        tokenizer = None
    if tokenizer is not None and not ids:
        ids = [load_tokenizer(tokenizer).end_id]
    source = ModelSource(
        name=name,
        kind="checkpoint",
        folder=str(trained.checkpoint),
        family=family,
        shape=shape,
        vocab_size=vocab_size,
        dtype=dtype,
        end_ids=ids,
        tokenizer_folder=None if tokenizer is None else str(tokenizer),
        step=step,
    )
    _check_shapes(source, shapes)
    return source


def load_stage(
    source: ModelSource,
    first_layer: int,
    last_layer: int,
    has_embedding: bool,
    has_head: bool,
    dtype: ServingDtype,
    progress: Progress = lambda done, total: None,
    held: Collection[str] = (),
) -> dict[str, Tensor]:
    """The parameters of a stage but those `held` already, under the names of models/decoder.py, on
    the CPU; of a matrix in int8 or int4 also its scales and zeros
    (serving/weight_quantization.py).

    Reads the tensors of this stage alone, one after the other, so that it needs little more memory
    than they have in `dtype`. `progress` gets the number of tensors done and of all. Raises
    ConfigError or CheckpointError for files that are missing, damaged or of another model.
    """
    shapes = source.parameter_shapes(first_layer, last_layer, has_embedding, has_head)
    shapes = {name: shape for name, shape in shapes.items() if name not in held}
    found: dict[str, Tensor] = {}
    with _TENSORS[source.kind](source) as tensors:
        for number, (name, shape) in enumerate(shapes.items()):
            progress(number, len(shapes))
            kind = stored_as(name, shape, dtype, source.group_size)
            try:
                found |= _read(source, tensors, name, shape, kind)
            except ConfigError as error:
                problems = [f"model {source.name}: {name} {what}" for what in error.problems]
                raise ConfigError(problems) from None
    progress(len(shapes), len(shapes))
    return found


def _read(
    source: ModelSource,
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    kind: ServingDtype,
) -> dict[str, Tensor]:
    """A parameter as a stage has it. ConfigError says what is wrong with it."""
    if source.kind == "parts":  # which are in this type
        return {one: tensors[one].clone() for one in tensor_names(name, kind)}
    if source.family == OURS:
        weight = tensors[name]
    elif _mlx_scales(location_of(name, source.family).name) in tensors:
        return _read_mlx(source, tensors, name, shape, kind)
    else:
        weight = from_huggingface(tensors, [name], source.family)[name]
    if tuple(weight.shape) != shape:
        raise ConfigError(
            f"has shape {list(weight.shape)} in {source.folder}, expected {list(shape)}"
        )
    return quantized(name, weight, kind, source.group_size)


def _read_mlx(
    source: ModelSource,
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    kind: ServingDtype,
) -> dict[str, Tensor]:
    """A matrix of an MLX folder: its own codes where they are what is asked for."""
    from smolrun.serving.weight_quantization import from_mlx, int4_from_mlx

    place = location_of(name, source.family).name
    module = place.removesuffix("weight")
    words, scales, biases = tensors[place], tensors[f"{module}scales"], tensors[f"{module}biases"]
    bits = 32 * words.shape[1] // shape[1]
    if kind == "int4" and bits == 4 and scales.shape[1] * source.group_size == shape[1]:
        # Copies: what safetensors gives is mapped from the file.
        codes = [tensor.clone() for tensor in int4_from_mlx(words, scales, biases)]
        return dict(zip(tensor_names(name, kind), codes, strict=True))
    return quantized(name, from_mlx(words, scales, biases, bits), kind, source.group_size)


def _mlx_scales(name: str) -> str:
    return f"{name.removesuffix('weight')}scales"


class _FolderTensors(Mapping[str, "Tensor"]):
    """The tensors of a Hugging Face folder, read when they are looked up."""

    def __init__(self, source: ModelSource) -> None:
        self._folder = source.folder
        self._stored = stored_tensors(Path(source.folder))
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path = self._stored[name].file
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __enter__(self) -> _FolderTensors:
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.clear()  # a file is closed with its last reference


class _RunTensors(Mapping[str, "Tensor"]):
    """The parameters in a checkpoint of ours, without the prefix of their keys."""

    def __init__(self, source: ModelSource) -> None:
        from smolrun.checkpoints.reader import CheckpointReader

        self._reader: CheckpointReader = CheckpointReader(Path(source.folder))
        self._prefix = _MODEL if source.family == OURS else _MODEL + _NETWORK
        self._keys = self._reader.keys(self._prefix)

    def __getitem__(self, name: str) -> Tensor:
        from smolrun.models.export import trained_value

        return trained_value(self._reader, self._prefix + name)

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._reader.manifest.tensors

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __enter__(self) -> _RunTensors:
        return self

    def __exit__(self, *raised: object) -> None:
        self._reader.close()


def part_of(name: str) -> str:
    """The part that has a parameter of ours."""
    if name.startswith("blocks."):
        return f"layer-{name.split('.')[1]}.safetensors"
    is_embedding = name.startswith(("token_embedding.", "position_embedding."))
    return "embedding.safetensors" if is_embedding else "head.safetensors"


class _PartTensors(Mapping[str, "Tensor"]):
    """The parameters in parts, read when they are looked up."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        part = part_of(name)
        path = Path(self._source.folder) / self._source.parts[part] / part
        try:
            if part not in self._open:
                self._open[part] = safe_open(path, framework="pt")
            tensor: Tensor = self._open[part].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.parts)

    def __len__(self) -> int:
        return len(self._source.parts)

    def __enter__(self) -> _PartTensors:
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.clear()


_TENSORS: dict[str, type[_FolderTensors] | type[_RunTensors] | type[_PartTensors]] = {
    "huggingface": _FolderTensors,
    "checkpoint": _RunTensors,
    "parts": _PartTensors,
}


def _config(folder: Path, name: str) -> tuple[dict[str, Any], DecoderShape]:
    """config.json, and what it means for our decoder; ConfigError for what that cannot be."""
    config = read_config(folder)
    try:
        keys = decoder_keys_from_hf(config)
        shape = completed_shape(**{key: keys[key] for key in keys if key != "vocab_size"})
    except ConfigError as error:
        problems = [f"model {name} cannot be served: {problem}" for problem in error.problems]
        raise ConfigError(problems) from None
    except KeyError as error:
        raise ConfigError(f"model {name}: its config.json lacks {error}") from None
    return config, shape


def _shape_of_run(trained: TrainedModel) -> DecoderShape:
    from smolrun.models.export import shape_of

    return shape_of(trained.keys)


def _config_folder(trained: TrainedModel, network_folder: Path | None) -> Path:
    """Where the config.json of a trained model of transformers lies."""
    kept = trained.run_folder / "model"
    if (kept / "config.json").is_file() or network_folder is None:
        return kept
    return network_folder


def _narrowest(dtypes: Iterator[str]) -> ServingDtype:
    """bf16 if the weights are, or else float32, which holds fp16's values too."""
    counts = Counter(dtypes)
    return "bf16" if counts and counts.most_common(1)[0][0] == "BF16" else "float32"


def _logical_shapes(
    source: ModelSource, stored: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors of an MLX folder, of a packed matrix [O, words] as [O, I]."""
    found = {key: shape for key, (_, shape) in stored.items()}
    expected = source.parameter_shapes(0, source.shape.layers - 1, True, True)
    for name, shape in expected.items():
        key = location_of(name, source.family).name
        groups = found.get(_mlx_scales(key))
        if groups is None or stored[key][0] != "U32" or source.family == "gpt2":
            continue
        biases = found.get(f"{key.removesuffix('weight')}biases")
        rows, words = found[key]
        is_whole = groups == biases == (rows, groups[-1]) and shape[-1] % groups[-1] == 0
        if is_whole and 32 * words in (4 * shape[-1], 8 * shape[-1]):
            found[key] = (rows, shape[-1])
    return found


def _check_shapes(source: ModelSource, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConfigError naming the first tensor of the model that is missing or misshapen."""
    problems = []
    for name, shape in source.parameter_shapes(0, source.shape.layers - 1, True, True).items():
        location = (
            TensorLocation(name) if source.family == OURS else location_of(name, source.family)
        )
        found = stored.get(location.name, stored.get(location.name.removeprefix("transformer.")))
        if found is None:
            problems.append(f"{location.name} is missing")
        elif found != _stored_shape(shape, location):
            expected = list(_stored_shape(shape, location))
            problems.append(f"{location.name} has shape {list(found)}, expected {expected}")
    if problems:
        more = f" ({len(problems)} such tensors)" if len(problems) > 1 else ""
        raise ConfigError(f"model {source.name}: in {source.folder}, {problems[0]}{more}")


def _stored_shape(shape: tuple[int, ...], location: TensorLocation) -> tuple[int, ...]:
    """Of the whole tensor that our parameter is a part of."""
    stored = shape[::-1] if location.is_transposed else shape
    return (*stored[:-1], stored[-1] * location.parts)
