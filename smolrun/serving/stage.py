"""One stage of a decoder for inference: contiguous layers, and the keys and values of its slots.

    batch: slot 3 | slot 0 . . . .      rows of different lengths, flat, without padding
           [T] tokens -> embedding -> layers (q/k/v in one product, gate/up in one) -> norm -> head

Computes what models/decoder.py computes, from its parameters, in fewer and larger operations.
Knows nothing of ranks, requests or sampling.
Shape suffixes: T tokens of the batch, R rows of logits, D width, F feed-forward width,
V vocabulary, H heads, G key/value heads, K head width, S keys.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smolrun.models.attention import rotation_of
from smolrun.models.feed_forward import choose
from smolrun.models.kv_cache import may_look
from smolrun.models.shape import DecoderShape, parameter_shapes
from smolrun.serving.batch import Batch, Row
from smolrun.serving.weights import AnyLinear, FeedForwardWeights, Layer, WeightReader

# Rows of one token attend together if that computes at most so many products of a query's and a
# key's element in vain a row: another call takes as long (128 keys of SmolLM2's 9 heads of 64).
_SPARE_PRODUCTS = 128 * 9 * 64


@dataclass(frozen=True)
class _Attention:
    """One product of queries with keys low .. high - 1: of a row, or of `slots` rows of one token
    each, whose slots follow each other.

    `first` .. `after` - 1 are its tokens in the batch. `mask` is 0 where a query attends to a key
    and minus infinity elsewhere: [T, S] of a row, else [slots, 1, 1, S].
    """

    first: int
    after: int
    slot: int
    slots: int
    low: int
    high: int
    mask: Tensor


@dataclass(frozen=True)
class _Step:
    """What all layers share in one run."""

    positions_T: Tensor
    places_T: Tensor  # of the new tokens in the cache, over all slots
    rotation: tuple[Tensor, Tensor] | None  # cosines and sines [T, H + 2 G, K]
    attentions: list[_Attention]


class Stage:
    """Layers first_layer .. last_layer (both included), with or without embedding and head, and
    `slots` sequences of up to `capacity` tokens each.

    `parameters` have the names of models/decoder.py; the dict is emptied, so that joined weights
    need memory for one layer twice only; matrices may be quantized, as `load_stage` makes them.
    Computes in `dtype`, on the device of the parameters.
    `batch_invariant`: what is computed for a token does not depend, to the last bit, on neighbours
    or chunks; prompts then take several times as long. `kept` is an earlier stage of the same
    model, dtype and device: the weights of its that this one needs are shared with it, and are not
    among the parameters.
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
        batch_invariant: bool = False,
        kept: Stage | None = None,
    ) -> None:
        if capacity > shape.max_sequence_length:
            limit = f"max_sequence_length={shape.max_sequence_length}"
            raise ValueError(f"slots of {capacity} tokens pass {limit}")
        self.shape, self.vocab_size = shape, vocab_size
        self.has_embedding, self.has_head = has_embedding, has_head
        self.slots, self.capacity, self.dtype = slots, capacity, dtype
        self.device: torch.device = kept.device if kept else next(iter(parameters.values())).device
        self.layers = range(first_layer, last_layer + 1)
        self._is_invariant = batch_invariant
        weights = WeightReader(parameters, shape, dtype, is_invariant=batch_invariant)
        self._embedding = weights.embedding("token_embedding")
        self._position_embedding = weights.embedding("position_embedding")
        has = kept.layers if kept else range(0)
        self._layers: list[Layer] = [
            kept._layers[has.index(layer)] if kept and layer in has else weights.layer(layer)
            for layer in self.layers
        ]
        if kept is not None:
            self._keep_ends(kept)
        if not has_head:
            self._norm = self._head = None
        elif kept is not None and kept.has_head:
            self._norm, self._head = kept._norm, kept._head
        else:
            self._norm = weights.norm("norm")
            self._head = weights.embedding("head") or self._embedding
        self._rotation = self._rotation_tables() if shape.position == "rope" else None
        # Zeros, not empty: keys beyond a sequence's end are masked, and must be finite for that.
        sizes = (len(self._layers), slots, capacity, 2 * shape.kv_heads, shape.head_width)
        self._cache = _zeros(sizes, dtype, self.device)
        self._written = [0] * slots  # tokens of each slot that may not be zeros

    def _keep_ends(self, kept: Stage) -> None:
        """The embeddings, where this stage needs them."""
        if self._embedding is None and (self.has_embedding or self._ties_head()):
            self._embedding = kept._embedding
        if self._position_embedding is None and self.has_embedding:
            self._position_embedding = kept._position_embedding

    def _ties_head(self) -> bool:
        return self.has_head and self.shape.tie_embeddings

    def parameter_names(self) -> set[str]:
        """Names of the parameters that its weights were made of."""
        ends = (self.has_embedding, self.has_head)
        first, last = self.layers.start, self.layers.stop - 1
        return {*parameter_shapes(self.shape, self.vocab_size, first, last, *ends)}

    def shrink(self, layers: range) -> None:
        """Give back the memory of the slots, and of its layers that are not among these; it must
        not run any more."""
        self._cache = self._cache.new_empty(0)
        kept = range(max(layers.start, self.layers.start), min(layers.stop, self.layers.stop))
        self._layers = [self._layers[self.layers.index(layer)] for layer in kept]
        self.layers = kept

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
        self._prepare_slots(batch)
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

    def _prepare_slots(self, batch: Batch) -> None:
        """Copies forked prefixes, and clears what an earlier sequence left in an opened slot.

        Rows that attend together look at keys beyond a sequence's end. They are masked, but a value
        that is not finite would come through: 0 x NaN.
        """
        for fork in batch.forks:
            source = self._cache[:, fork.source, : fork.length]
            self._cache[:, fork.target, : fork.length].copy_(source)
            self._written[fork.target] = max(self._written[fork.target], fork.length)
        for opened in batch.opened:
            kept = len(opened.history)
            self._cache[:, opened.slot, kept : self._written[opened.slot]].zero_()
            self._written[opened.slot] = kept

    def _plan(self, batch: Batch) -> _Step:
        positions: list[int] = []
        places: list[int] = []
        for row in batch.rows:
            end = row.start + row.count
            if end > self.capacity or not 0 <= row.slot < self.slots:
                raise ValueError(
                    f"batch {batch.number}: slot {row.slot} to token {end} is beyond the "
                    f"{self.slots} slots of {self.capacity} tokens"
                )
            positions += range(row.start, end)
            base = row.slot * self.capacity
            places += range(base + row.start, base + end)
            self._written[row.slot] = max(self._written[row.slot], end)
        positions_T = torch.tensor(positions, device=self.device)
        return _Step(
            positions_T,
            torch.tensor(places, device=self.device),
            self._rotation_at(positions_T),
            self._attentions(batch.rows),
        )

    def _attentions(self, rows: Sequence[Row]) -> list[_Attention]:
        """Rows of one token are joined where their slots follow each other and little is wasted.

        To be invariant every token attends alone, as it does when it is decoded alone.
        """
        if self._is_invariant:
            rows = [Row(row.slot, row.start + i, 1, True) for row in rows for i in range(row.count)]
            return [self._attention([row], first) for first, row in enumerate(rows)]
        spare = _SPARE_PRODUCTS // (self.shape.heads * self.shape.head_width)
        groups: list[list[Row]] = []
        for row in rows:
            group = [*groups[-1], row] if groups else [row]
            lengths = [row.start for row in group]
            is_joined = (
                len(group) > 1
                and all(row.count == 1 for row in group[-2:])
                and row.slot == group[-2].slot + 1
                and len(group) * (max(lengths) - spare) <= sum(lengths)
            )
            if is_joined:
                groups[-1] = group
            else:
                groups.append([row])
        attentions: list[_Attention] = []
        first = 0
        for group in groups:
            attentions.append(self._attention(group, first))
            first = attentions[-1].after
        return attentions

    def _attention(self, group: Sequence[Row], first: int) -> _Attention:
        window = self.shape.sliding_window
        low = 0 if window is None else max(0, min(row.start for row in group) - window + 1)
        high = max(row.start + row.count for row in group)
        starts, count = [row.start for row in group], group[0].count
        queries = torch.tensor(starts, device=self.device)[:, None]
        queries = queries + torch.arange(count, device=self.device)  # positions [slots, T]
        keys = torch.arange(low, high, device=self.device)
        may = may_look(queries[..., None], keys, window)
        mask = torch.zeros(may.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(~may, -math.inf)
        mask = mask[0] if count > 1 else mask[:, None]
        after = first + sum(row.count for row in group)
        return _Attention(first, after, group[0].slot, len(group), low, high, mask)

    def _embed(self, embedding: AnyLinear, token_ids: Sequence[int], positions_T: Tensor) -> Tensor:
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
        query_THK = heads[:, :num_heads]
        mixed = [self._mix(query_THK, cache, attention) for attention in step.attentions]
        return layer.attention_output(mixed[0] if len(mixed) == 1 else torch.cat(mixed))

    def _mix(self, query_THK: Tensor, cache: Tensor, attention: _Attention) -> Tensor:
        """[tokens, H K] of some rows. Query heads are grouped by key/value head; no key is copied.

        The float mask takes torch's faster kernel even where it hides nothing.
        """
        num_kv_heads = self.shape.kv_heads
        first, after, slot = attention.first, attention.after, attention.slot
        query = query_THK[first:after].unflatten(1, (num_kv_heads, -1))  # [T, G, H / G, K]
        if after - first == attention.slots:
            # One token a slot: the queries of a group stand where else those of several tokens do.
            both = cache[slot : slot + attention.slots, attention.low : attention.high]
            both = both.transpose(1, 2)  # [slots, 2 G, S, K]
            key, value = both[:, :num_kv_heads], both[:, num_kv_heads:]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention.mask)
            return mixed.reshape(after - first, -1)
        query = query.permute(1, 2, 0, 3)  # [G, H / G, T, K]
        both = cache[slot, attention.low : attention.high].transpose(0, 1)[:, None]
        both = both.expand(-1, query.shape[1], -1, -1)  # [2 G, H / G, S, K]
        key, value = both[:num_kv_heads], both[num_kv_heads:]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention.mask)
        return mixed.permute(2, 0, 1, 3).reshape(after - first, -1)

    def _feed_forward(self, layer: Layer, hidden_TD: Tensor) -> Tensor:
        hidden_TD = layer.feed_forward_norm(hidden_TD)
        if layer.router is None or self.shape.moe is None:
            return self._run(layer.feed_forwards[0], hidden_TD)
        _, weight_TK, expert_TK = choose(layer.router(hidden_TD), self.shape.moe)
        added_TD = torch.zeros_like(hidden_TD)
        for expert in expert_TK.unique().tolist():  # in one order, whatever else is in the batch
            token_R, place_R = (expert_TK == expert).nonzero(as_tuple=True)
            made_RD = self._run(layer.feed_forwards[expert], hidden_TD[token_R])
            weight_R1 = weight_TK[token_R, place_R, None].to(made_RD.dtype)
            added_TD.index_add_(0, token_R, made_RD * weight_R1)
        return added_TD

    def _run(self, weights: FeedForwardWeights, hidden_TD: Tensor) -> Tensor:
        inner = weights.gate_up(hidden_TD)
        if not self._is_invariant:
            return weights.down(self._activated(inner))
        # Threads divide many rows anywhere, and the last few elements of each part are computed by
        # other instructions: the bits would depend on the number of rows.
        return weights.down(torch.cat([self._activated(row) for row in inner.split(1)]))

    def _activated(self, inner: Tensor) -> Tensor:
        """[T, F] of what `gate_up` gave."""
        if self.shape.activation == "swiglu":
            gate_TF, up_TF = inner.chunk(2, -1)
            return F.silu(gate_TF) * up_TF
        return F.gelu(inner, approximate="tanh")

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


def _zeros(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros, which writes all of it; on the CPU a page takes memory once it is written."""
    if device.type != "cpu":
        return torch.zeros(sizes, dtype=dtype, device=device)
    num_bytes = math.prod(sizes) * dtype.itemsize
    # Not numpy's zeros: it asks for pages of 2 MB, of which one token would take one a layer.
    memory = mmap.mmap(-1, num_bytes, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=dtype).view(sizes)
