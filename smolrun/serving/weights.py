"""The weights of a stage, as it computes with them: the one place where their types live.

Made from the parameters of models/decoder.py; products of one input are joined.
Shape suffixes: O outputs, I inputs, T tokens, D width, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smolrun.models.shape import DecoderShape, feed_forwards
from smolrun.serving.messages import ServingDtype
from smolrun.serving.weight_quantization import Int4Weight, Int8Weight

# What a stage computes in, and sends, by the type of its weights.
COMPUTE_DTYPES: dict[ServingDtype, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}

# From how many rows on the product W x^T takes less time than x W^T; the results are the same. On
# an x86 processor, [3072, 576] and 8 rows: bf16 0.25 against 0.32 ms, float32 0.71 against 0.88;
# [49152, 576]: 6.1 against 8.5, 26.8 against 35.6. One row in bf16 by torch.mv: 0.20 against 0.30.
_FEWEST_ROWS = {torch.bfloat16: 2, torch.float32: 7}
_MOST_ROWS = 32
# Rows of every product where results must not depend on their number: bf16 takes hardly longer for
# 16 rows than for one, as it waits for the weights.
_FIXED_ROWS = 16


class Linear:
    """y = W x + b for rows x, in the dtype of W (float32 or bfloat16).

    `is_invariant`: a row's result does not depend on the others, to the last bit, as all products
    are of as many rows.
    """

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None = None, *, is_invariant: bool = False
    ) -> None:
        self.weight = weight_OI
        self.bias = bias_O
        self.is_invariant = is_invariant
        self._is_on_cpu = weight_OI.device.type == "cpu"
        self._fewest_rows = _FEWEST_ROWS.get(weight_OI.dtype, _MOST_ROWS)

    def __call__(self, inputs_TI: Tensor) -> Tensor:
        if self.is_invariant:
            return self._invariant(inputs_TI)
        if not self._is_on_cpu:
            return F.linear(inputs_TI, self.weight, self.bias)
        outputs_TO = self._product(inputs_TI)
        return outputs_TO if self.bias is None else outputs_TO + self.bias

    def _product(self, inputs_TI: Tensor) -> Tensor:
        """Of few rows, by the routine that reads the weights fastest."""
        num_rows = len(inputs_TI)
        if num_rows == 1:
            return torch.mv(self.weight, inputs_TI[0])[None]
        if self._fewest_rows <= num_rows <= _MOST_ROWS:
            return (self.weight @ inputs_TI.T).T.contiguous()
        return F.linear(inputs_TI, self.weight)

    def _invariant(self, inputs_TI: Tensor) -> Tensor:
        def product(block: Tensor) -> Tensor:
            return F.linear(block, self.weight, self.bias)

        return _in_blocks(inputs_TI, _FIXED_ROWS, product)

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the matrix, for one that is also an embedding."""
        return F.embedding(ids_T, self.weight)

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class QuantizedLinear:
    """As Linear, with a matrix in int8 or int4 and inputs in bf16."""

    def __init__(
        self,
        weight: Int8Weight | Int4Weight,
        bias_O: Tensor | None = None,
        *,
        is_invariant: bool = False,
    ) -> None:
        self.weight, self.bias = weight, bias_O
        self._fixed_rows: int | None = None
        if is_invariant:
            # A kernel takes the time of one row times their number: nothing is gained by more.
            self._fixed_rows = 1 if weight.has_kernel else _FIXED_ROWS

    def __call__(self, inputs_TI: Tensor) -> Tensor:
        if self._fixed_rows is None:
            outputs_TO = self.weight.product(inputs_TI)
        else:
            outputs_TO = _in_blocks(inputs_TI, self._fixed_rows, self.weight.product)
        return outputs_TO if self.bias is None else outputs_TO + self.bias

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the matrix, for one that is also an embedding."""
        assert isinstance(self.weight, Int8Weight), "embeddings are int8"
        return self.weight.rows(ids_T)

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


AnyLinear = Linear | QuantizedLinear


def _in_blocks(inputs_TI: Tensor, num_rows: int, product: Callable[[Tensor], Tensor]) -> Tensor:
    """A product in blocks of `num_rows`, the last one filled up: no row depends on the others."""
    blocks = F.pad(inputs_TI, (0, 0, 0, -len(inputs_TI) % num_rows)).split(num_rows)
    return torch.cat([product(block) for block in blocks])[: len(inputs_TI)]


class Norm:
    """layernorm where there is a bias, else rmsnorm; over the last axis."""

    def __init__(self, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight_D, bias_D, eps

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        size = self.weight.shape
        if self.bias is None:
            return F.rms_norm(hidden_TD, list(size), self.weight, self.eps)
        return F.layer_norm(hidden_TD, size, self.weight, self.bias, self.eps)

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True)
class FeedForwardWeights:
    """Of one feed-forward layer, or of one expert; `gate_up` is `up` where the activation is
    gelu."""

    gate_up: AnyLinear
    down: AnyLinear


@dataclass(frozen=True)
class Layer:
    """The weights of one layer. `head_norm` [H + G, K]: of queries and keys, if they are normed.
    `router` chooses among several feed-forward layers, None: there is one."""

    attention_norm: Norm
    query_key_value: AnyLinear
    head_norm: Tensor | None
    attention_output: AnyLinear
    feed_forward_norm: Norm
    router: AnyLinear | None
    feed_forwards: Sequence[FeedForwardWeights]

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        parts = (
            *(self.attention_norm, self.query_key_value, self.attention_output),
            *(self.feed_forward_norm, self.head_norm, self.router),
            *(part for one in self.feed_forwards for part in (one.gate_up, one.down)),
        )
        return sum(part.nbytes for part in parts if part is not None)


class WeightReader:
    """Takes the parameters of a decoder out of a dict, in the form in which a stage needs them.

    A quantized matrix has scales, and zeros, beside its weight; the rest is converted to `dtype`.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        shape: DecoderShape,
        dtype: torch.dtype,
        *,
        is_invariant: bool,
    ) -> None:
        self._parameters, self._shape, self._dtype = parameters, shape, dtype
        self._is_invariant = is_invariant

    def _take(self, name: str) -> Tensor | None:
        return _take(self._parameters, name, self._dtype)

    def embedding(self, name: str) -> AnyLinear | None:
        return self.linear(name) if f"{name}.weight" in self._parameters else None

    def norm(self, name: str) -> Norm:
        weight = self._take(f"{name}.weight")
        assert weight is not None, name
        return Norm(weight, self._take(f"{name}.bias"), self._shape.norm_eps)

    def linear(self, *names: str) -> AnyLinear:
        """The products of one input, side by side."""
        return linear_of(self._parameters, names, self._dtype, is_invariant=self._is_invariant)

    def layer(self, layer: int) -> Layer:
        block, shape = f"blocks.{layer}", self._shape
        names = ("gate", "up") if shape.activation == "swiglu" else ("up",)
        return Layer(
            attention_norm=self.norm(f"{block}.attention_norm"),
            query_key_value=self.linear(
                *(f"{block}.attention.{name}" for name in ("query", "key", "value"))
            ),
            head_norm=self._head_norm(block),
            attention_output=self.linear(f"{block}.attention.output"),
            feed_forward_norm=self.norm(f"{block}.feed_forward_norm"),
            router=None if shape.moe is None else self.linear(f"{block}.feed_forward.router"),
            feed_forwards=[
                FeedForwardWeights(
                    self.linear(*(f"{block}.{one}.{name}" for name in names)),
                    self.linear(f"{block}.{one}.down"),
                )
                for one in feed_forwards(shape)
            ],
        )

    def _head_norm(self, block: str) -> Tensor | None:
        query = self._take(f"{block}.attention.query_norm.weight")
        key = self._take(f"{block}.attention.key_norm.weight")
        if query is None or key is None:
            return None
        shape = self._shape
        return torch.cat((query.expand(shape.heads, -1), key.expand(shape.kv_heads, -1)))


def linear_of(
    parameters: dict[str, Tensor],
    names: Sequence[str],
    dtype: torch.dtype,
    *,
    is_invariant: bool = False,
) -> AnyLinear:
    """The products of one input, side by side, taken out of the dict."""
    weight, bias, scales, zeros = (
        _joined([_take(parameters, f"{name}.{kind}", dtype) for name in names])
        for kind in ("weight", "bias", "scales", "zeros")
    )
    assert weight is not None, names
    if scales is None:
        return Linear(weight, bias, is_invariant=is_invariant)
    quantized = Int8Weight(weight, scales) if zeros is None else Int4Weight(weight, scales, zeros)
    return QuantizedLinear(quantized, bias, is_invariant=is_invariant)


def _take(parameters: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor | None:
    tensor = parameters.pop(name, None)
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype)


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    """All of them as one, or the only one; None where there are none."""
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) < 2:
        return found[0] if found else None
    return torch.cat(found)
