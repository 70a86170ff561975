"""Types of the weights of a served model: which parameter has which, their bytes, and making them.

Knows no file; without torch but for `quantized`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from smolrun.errors import ConfigError
from smolrun.models.shape import DecoderShape, ModelBytes, model_bytes
from smolrun.serving.messages import ServingDtype

if TYPE_CHECKING:
    from torch import Tensor

# Of weights in int4: 4.5 bits a weight, as MLX has it too. Larger groups lose accuracy.
GROUP_SIZE = 64
_MLX_GROUPS = (32, 64, 128)
_ITEM_BYTES = {"float32": 4, "bf16": 2}
_QUANTIZED: list[ServingDtype] = ["int8", "int4"]


def stored_as(
    name: str, shape: tuple[int, ...], dtype: ServingDtype, group_size: int = GROUP_SIZE
) -> ServingDtype:
    """The type of a parameter in a stage whose weights are `dtype`.

    Vectors, positions and routers are not quantized. Embedding and head are at least int8: rows
    are looked up in one, and the other decides between tokens. So is a matrix that groups do not
    divide.
    """
    if dtype not in ("int8", "int4"):
        return dtype
    if len(shape) < 2 or name.startswith("position_embedding.") or ".router." in name:
        return "bf16"
    is_end = name.startswith(("token_embedding.", "head."))
    return "int8" if is_end or shape[1] % group_size else dtype


def serving_bytes(
    shape: DecoderShape, vocab_size: int, dtype: ServingDtype, group_size: int = GROUP_SIZE
) -> ModelBytes:
    """The sizes of a decoder in stages whose weights are `dtype`."""

    def size_of(name: str, size: tuple[int, ...]) -> int:
        kind, count = stored_as(name, size, dtype, group_size), math.prod(size)
        if kind == "int8":
            return count + 2 * size[0]  # a scale a row
        if kind == "int4":
            return count // 2 + 4 * count // group_size  # a scale and a zero a group
        return count * _ITEM_BYTES[kind]

    return model_bytes(shape, vocab_size, 4 if dtype == "float32" else 2, size_of)


def weight_options(
    asked: Literal["auto"] | ServingDtype,
    stored: ServingDtype,
    shape: DecoderShape,
    vocab_size: int,
    group_size: int = GROUP_SIZE,
) -> dict[ServingDtype, ModelBytes]:
    """The sizes of a model by the types of weights that are tried, in this order, until one fits:
    the asked one, or for auto that in which it is stored, then the smaller ones."""
    first = _QUANTIZED.index(stored) + 1 if stored in _QUANTIZED else 0
    kinds = [stored, *_QUANTIZED[first:]] if asked == "auto" else [asked]
    return {kind: serving_bytes(shape, vocab_size, kind, group_size) for kind in kinds}


def quantized(
    name: str, weight: Tensor, kind: ServingDtype, group_size: int = GROUP_SIZE
) -> dict[str, Tensor]:
    """The tensors of a parameter in int8 or int4, or itself in another type, as a copy."""
    import torch

    from smolrun.serving import weight_quantization

    if kind in ("float32", "bf16"):
        # What safetensors gives is mapped from the file.
        return {name: weight.to(torch.float32 if kind == "float32" else torch.bfloat16, copy=True)}
    made: tuple[Tensor, ...] = (
        weight_quantization.quantize_int8(weight)
        if kind == "int8"
        else weight_quantization.quantize_int4(weight, group_size)
    )
    return dict(zip(tensor_names(name, kind), made, strict=True))


def tensor_names(name: str, kind: ServingDtype) -> list[str]:
    """Of the tensors of a weight in this type: itself, its scales, its zeros."""
    module = name.removesuffix("weight")
    count = {"int8": 2, "int4": 3}.get(kind, 1)
    return [name, f"{module}scales", f"{module}zeros"][:count]


def mlx_type(config: Mapping[str, Any], name: str) -> tuple[ServingDtype, int] | None:
    """The type and the group size of a folder that is quantized as MLX does it; None for one that
    is not quantized. ConfigError for other schemes."""
    found = config.get("quantization") or config.get("quantization_config")
    if not found:
        return None
    keys = found if isinstance(found, Mapping) else {}
    scheme = keys.get("quant_method") or keys.get("mode", "affine")
    bits, group_size = keys.get("bits"), keys.get("group_size")
    if scheme == "affine" and bits in (4, 8) and group_size in _MLX_GROUPS:
        return ("int4" if bits == 4 else "int8"), int(group_size)
    what = f"quant_method {scheme}" if "quant_method" in keys else f"mode {scheme}"
    raise ConfigError(
        f"model {name}: its weights are quantized in a scheme that cannot be read ({what}, "
        f"bits {bits}, group_size {group_size}); MLX's affine 4 and 8 bits in groups of 32, 64 or "
        "128 can. Or take the model that it was made from, with serving.weights=int4"
    )
