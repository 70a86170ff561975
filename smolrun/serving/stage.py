"""One stage of a decoder for inference: contiguous layers, and the keys and values of its slots.

    batch: slot 3 | slot 0 . . . .      rows of different lengths, flat, without padding
           [T] tokens -> embedding -> layers (q/k/v in one product, gate/up in one) -> norm -> head

Computes what models/decoder.py computes, from its parameters, in fewer and larger operations.
Knows nothing of ranks, requests or sampling.
Shape suffixes: T tokens of the batch, R rows of logits, D width, F feed-forward width,
V vocabulary, H heads, G key/value heads, K head width, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smolrun.models.attention import rotation_of
from smolrun.models.kv_cache import may_look
from smolrun.models.shape import DecoderShape
from smolrun.serving.batch import Batch, Fork
from smolrun.serving.linear import Linear


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
class Layer:
    """The weights of one layer. `head_norm` [H + G, K]: of queries and keys, if they are normed."""

    attention_norm: Norm
    query_key_value: Linear
    head_norm: Tensor | None
    attention_output: Linear
    feed_forward_norm: Norm
    gate_up: Linear  # only `up` where the activation is gelu
    down: Linear

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        parts = (
            *(self.attention_norm, self.query_key_value, self.attention_output),
            *(self.feed_forward_norm, self.gate_up, self.down),
        )
        own = 0 if self.head_norm is None else self.head_norm.nbytes
        return own + sum(part.nbytes for part in parts)


@dataclass(frozen=True)
class _RowAttention:
    """One row of a batch: its tokens [first, after), its slot, and keys [low, high) it looks at.

    `mask_TS` is None where every token sees all of them.
    """

    first: int
    after: int
    slot: int
    low: int
    high: int
    mask_TS: Tensor | None


@dataclass(frozen=True)
class _Step:
    """What all layers share in one run."""

    positions_T: Tensor
    places_T: Tensor  # of the new tokens in the cache, over all slots
    rotation: tuple[Tensor, Tensor] | None  # cosines and sines [T, H + 2 G, K]
    rows: list[_RowAttention]


class Stage:
    """Layers first_layer .. last_layer (both included), with or without embedding and head, and
    `slots` sequences of up to `capacity` tokens each.

    `parameters` have the names of models/decoder.py; the dict is emptied, so that joined weights
    need memory for one layer twice only. Computes in `dtype`, on the device of the parameters.
    Raises ValueError for a capacity beyond max_sequence_length.
    """

    def __init__(
        self,
        shape: DecoderShape,
        vocab_size: int,
        first_layer: int,
        last_layer: int,
        has_embedding: bool,
        has_head: bool,
        parameters: dict[str, Tensor],
        *,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
    ) -> None:
        if capacity > shape.max_sequence_length:
            limit = f"max_sequence_length={shape.max_sequence_length}"
            raise ValueError(f"slots of {capacity} tokens pass {limit}")
        self.shape, self.vocab_size = shape, vocab_size
        self.has_embedding, self.has_head = has_embedding, has_head
        self.slots, self.capacity, self.dtype = slots, capacity, dtype
        self.device = next(iter(parameters.values())).device
        weights = _Weights(parameters, shape, dtype)
        self._embedding = weights.embedding("token_embedding")
        self._position_embedding = weights.embedding("position_embedding")
        self._layers = [weights.layer(layer) for layer in range(first_layer, last_layer + 1)]
        self._norm = weights.norm("norm") if has_head else None
        self._head = (weights.embedding("head") or self._embedding) if has_head else None
        self._rotation = self._rotation_tables() if shape.position == "rope" else None
        # Zeros, not empty: the operating system gives their memory when they are first written.
        self._cache = torch.zeros(
            (len(self._layers), slots, capacity, 2 * shape.kv_heads, shape.head_width),
            dtype=dtype,
            device=self.device,
        )

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights; a tied embedding counts once."""
        ends = {self._embedding, self._position_embedding, self._norm, self._head} - {None}
        parts = [*self._layers, *ends]
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def cache_bytes(self) -> int:
        """Memory of all slots."""
        return self._cache.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Of the keys and values of one token."""
        return self.cache_bytes // (self.slots * self.capacity)

    @torch.inference_mode()
    def run(self, batch: Batch, hidden_TD: Tensor | None) -> Tensor:
        """Hidden [T, D] of the batch's tokens in `dtype`; of a stage with head, logits [R, V] in
        float32 for the tokens of `batch.logit_tokens()`.

        `hidden_TD` is what the stage before returned; None for a stage with embedding. Raises
        ValueError for a row beyond the slots or their capacity.
        """
        for fork in batch.forks:
            self._fork(fork)
        step = self._plan(batch)
        if self._embedding is not None and self.has_embedding:
            hidden_TD = self._embed(self._embedding, batch.token_ids, step.positions_T)
        assert hidden_TD is not None, "a stage without embedding gets hidden states"
        hidden_TD = hidden_TD.to(self.device, self.dtype)
        for layer, cache in zip(self._layers, self._cache.unbind(), strict=True):
            hidden_TD = hidden_TD + self._attend(layer, cache, hidden_TD, step)
            hidden_TD = hidden_TD + self._feed_forward(layer, hidden_TD)
        if self._head is None or self._norm is None:
            return hidden_TD
        places = batch.logit_tokens()
        if len(places) < len(hidden_TD):
            hidden_TD = hidden_TD[torch.tensor(places, dtype=torch.long, device=self.device)]
        return self._head(self._norm(hidden_TD)).float()

    def _fork(self, fork: Fork) -> None:
        source = self._cache[:, fork.source, : fork.length]
        self._cache[:, fork.target, : fork.length].copy_(source)

    def _plan(self, batch: Batch) -> _Step:
        positions: list[int] = []
        places: list[int] = []
        rows = []
        for row in batch.rows:
            first, end = len(positions), row.start + row.count
            if end > self.capacity or not 0 <= row.slot < self.slots:
                raise ValueError(
                    f"batch {batch.number}: slot {row.slot} to token {end} is beyond the "
                    f"{self.slots} slots of {self.capacity} tokens"
                )
            positions += range(row.start, end)
            base = row.slot * self.capacity
            places += range(base + row.start, base + end)
            window = self.shape.sliding_window
            low = 0 if window is None else max(0, row.start - window + 1)
            mask = self._mask(row.start, low, end) if row.count > 1 else None
            rows.append(_RowAttention(first, len(positions), row.slot, low, end, mask))
        positions_T = torch.tensor(positions, device=self.device)
        return _Step(
            positions_T,
            torch.tensor(places, device=self.device),
            self._rotation_at(positions_T),
            rows,
        )

    def _mask(self, start: int, low: int, end: int) -> Tensor:
        """[T, S]: which of the keys low .. end - 1 the tokens start .. end - 1 attend to."""
        positions = torch.arange(low, end, device=self.device)
        return may_look(positions[start - low :, None], positions, self.shape.sliding_window)

    def _embed(self, embedding: Linear, token_ids: Sequence[int], positions_T: Tensor) -> Tensor:
        hidden_TD = embedding.rows(torch.tensor(token_ids, device=self.device))
        if self._position_embedding is not None:
            hidden_TD = hidden_TD + self._position_embedding.rows(positions_T)
        return hidden_TD

    def _attend(self, layer: Layer, cache: Tensor, hidden_TD: Tensor, step: _Step) -> Tensor:
        """Attention of one layer; `cache` [slots, capacity, 2 G, K] gets the new keys and values.

        Queries, keys and values stay side by side as heads [T, H + G + G, K] throughout.
        """
        shape = self.shape
        num_heads, head_width = shape.heads, shape.head_width
        heads = layer.query_key_value(layer.attention_norm(hidden_TD))
        heads = heads.view(len(hidden_TD), -1, head_width)
        if layer.head_norm is not None:
            normed = heads[:, : len(layer.head_norm)]
            normed.copy_(F.rms_norm(normed, [head_width], None, shape.norm_eps) * layer.head_norm)
        if step.rotation is not None:
            cos, sin = step.rotation
            # Pairs (i, i + K/2): the partner of each element, whose sign is in `sin`.
            heads = torch.addcmul(heads * cos, heads.roll(head_width // 2, -1), sin)
        cache.flatten(0, 1).index_copy_(0, step.places_T, heads[:, num_heads:])
        mixed = [self._attend_row(heads[:, :num_heads], cache, row) for row in step.rows]
        return layer.attention_output(mixed[0] if len(mixed) == 1 else torch.cat(mixed))

    def _attend_row(self, query_THK: Tensor, cache: Tensor, row: _RowAttention) -> Tensor:
        """[T of the row, H K]. Query heads are grouped by key/value head; no key is copied."""
        num_kv_heads, head_width = self.shape.kv_heads, self.shape.head_width
        keys_values = cache[row.slot, row.low : row.high].transpose(0, 1)  # [2 G, S, K]
        key_GSK, value_GSK = keys_values[:num_kv_heads], keys_values[num_kv_heads:]
        query = query_THK[row.first : row.after].unflatten(1, (num_kv_heads, -1))
        if row.mask_TS is None:
            # One token: the queries of a group stand where else those of several tokens do.
            mixed = F.scaled_dot_product_attention(query, key_GSK[None], value_GSK[None])
            return mixed.reshape(1, -1)
        query = query.permute(1, 2, 0, 3)  # [G, H / G, T, K]
        size = (num_kv_heads, query.shape[1], -1, head_width)
        mixed = F.scaled_dot_product_attention(
            query,
            key_GSK[:, None].expand(size),
            value_GSK[:, None].expand(size),
            attn_mask=row.mask_TS,
        )
        return mixed.permute(2, 0, 1, 3).reshape(row.after - row.first, -1)

    def _feed_forward(self, layer: Layer, hidden_TD: Tensor) -> Tensor:
        inner = layer.gate_up(layer.feed_forward_norm(hidden_TD))
        if self.shape.activation == "swiglu":
            gate_TF, up_TF = inner.chunk(2, -1)
            inner = F.silu(gate_TF) * up_TF
        else:
            inner = F.gelu(inner, approximate="tanh")
        return layer.down(inner)

    def _rotation_tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of all positions, [capacity, K]."""
        shape, positions = self.shape, torch.arange(self.capacity, device=self.device)
        cos, sin = rotation_of(positions, shape.head_width, shape.rope_theta, shape.rope_scaling)
        return torch.cat((cos, cos), -1).to(self.dtype), torch.cat((-sin, sin), -1).to(self.dtype)

    def _rotation_at(self, positions_T: Tensor) -> tuple[Tensor, Tensor] | None:
        """Tables for all heads side by side; values are turned by the angle 0."""
        if self._rotation is None:
            return None
        shape = self.shape
        turned = shape.heads + shape.kv_heads
        size = (len(positions_T), turned + shape.kv_heads, shape.head_width)
        cos = torch.ones(size, dtype=self.dtype, device=self.device)
        sin = torch.zeros(size, dtype=self.dtype, device=self.device)
        cos[:, :turned] = self._rotation[0][positions_T][:, None]
        sin[:, :turned] = self._rotation[1][positions_T][:, None]
        return cos, sin


class _Weights:
    """Takes the parameters of a decoder out of a dict, in the form in which a stage needs them."""

    def __init__(
        self, parameters: dict[str, Tensor], shape: DecoderShape, dtype: torch.dtype
    ) -> None:
        self._parameters, self._shape, self._dtype = parameters, shape, dtype

    def _take(self, name: str) -> Tensor | None:
        tensor = self._parameters.pop(name, None)
        return None if tensor is None else tensor.detach().to(self._dtype)

    def embedding(self, name: str) -> Linear | None:
        weight = self._take(f"{name}.weight")
        return None if weight is None else Linear(weight)

    def norm(self, name: str) -> Norm:
        weight = self._take(f"{name}.weight")
        assert weight is not None, name
        return Norm(weight, self._take(f"{name}.bias"), self._shape.norm_eps)

    def linear(self, *names: str) -> Linear:
        weights = [self._take(f"{name}.weight") for name in names]
        biases = [self._take(f"{name}.bias") for name in names]
        if len(names) == 1 and weights[0] is not None:
            return Linear(weights[0], biases[0])
        return Linear.joined(
            [weight for weight in weights if weight is not None],
            [bias for bias in biases if bias is not None],
        )

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
            gate_up=self.linear(*(f"{block}.feed_forward.{name}" for name in names)),
            down=self.linear(f"{block}.feed_forward.down"),
        )

    def _head_norm(self, block: str) -> Tensor | None:
        query = self._take(f"{block}.attention.query_norm.weight")
        key = self._take(f"{block}.attention.key_norm.weight")
        if query is None or key is None:
            return None
        shape = self._shape
        return torch.cat((query.expand(shape.heads, -1), key.expand(shape.kv_heads, -1)))
