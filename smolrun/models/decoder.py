"""One readable decoder that is GPT-2, Llama, Qwen2, Qwen3, Mistral or SmolLM by its keys.

    tokens -> token_embedding (+ position_embedding) -> blocks[0] .. blocks[layers - 1] -> norm -> logits
              `-- has_embedding                        `-- first_layer .. last_layer       `-- has_head

Any stretch of it can be built alone, so that layers can be spread over hosts; a parameter has the
same name in every stretch. With tied embeddings the stretch that has the head also holds
`token_embedding.weight`: the first and the last host then own one parameter together and must add
up its gradients. It knows nothing of hosts: whoever cuts it moves `hidden_BTD` from one stretch to
the next.

Shape suffixes: B batch, T tokens, S tokens looked at, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smolrun.errors import ConfigError
from smolrun.models.attention import rotation_of
from smolrun.models.base import Init, Kind, ModelSpec
from smolrun.models.blocks import Block, norm_of
from smolrun.models.kv_cache import CacheStep, KVCache, may_look
from smolrun.models.shape import DecoderShape, default_ffn_width


class Decoder(nn.Module):
    """Layers first_layer..last_layer (both included) of a decoder, with or without its embedding
    and its head.
    """

    consumes: ClassVar[Kind] = "tokens"

    def __init__(
        self,
        shape: DecoderShape,
        vocab_size: int,
        first_layer: int = 0,
        last_layer: int | None = None,
        has_embedding: bool = True,
        has_head: bool = True,
    ) -> None:
        super().__init__()
        last_layer = shape.layers - 1 if last_layer is None else last_layer
        if not 0 <= first_layer <= last_layer < shape.layers:
            raise ValueError(
                f"layers {first_layer}..{last_layer} are not within 0..{shape.layers - 1}"
            )
        self.shape = shape
        self.vocab_size = vocab_size
        self.has_embedding, self.has_head = has_embedding, has_head
        # Set to True to keep only each block's input for backward and compute the rest again: less
        # memory, more time.
        self.recompute = False
        if has_embedding or (has_head and shape.tie_embeddings):
            self.token_embedding = nn.Embedding(vocab_size, shape.width)
        if has_embedding and shape.position == "learned":
            self.position_embedding = nn.Embedding(shape.max_sequence_length, shape.width)
        self.blocks = nn.ModuleDict(
            {str(i): Block(shape, i) for i in range(first_layer, last_layer + 1)}
        )
        if has_head:
            self.norm = norm_of(shape)
            if not shape.tie_embeddings:
                self.head = nn.Linear(shape.width, vocab_size, bias=False)

    def forward(
        self, inputs: Tensor, cache: KVCache | None = None, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [B, T, V] (or hidden [B, T, D] without the head) for token ids [B, T] (or hidden
        [B, T, D]).

        With a cache, the inputs continue its sequences; `counts[row]` tells how many of a row's T
        inputs are real, the rest is padding on the right. Raises ValueError where a sequence grows
        past max_sequence_length.
        """
        step = (
            None
            if cache is None
            else cache.plan(inputs.shape[1], counts, self.shape.sliding_window)
        )
        positions = self._positions(inputs) if step is None else step.positions_BT
        mask = self._window_mask(positions) if step is None else step.mask_B1TS
        hidden_BTD = self._embed(inputs, positions) if self.has_embedding else inputs
        hidden_BTD = self._run_blocks(hidden_BTD, positions, mask, cache, step)
        if cache is not None and step is not None:
            cache.advance(step)
        if not self.has_head:
            return hidden_BTD
        head = self.token_embedding if self.shape.tie_embeddings else self.head
        return F.linear(self.norm(hidden_BTD), head.weight)

    def _positions(self, inputs: Tensor) -> Tensor:
        """0 .. T-1 for a call without a cache."""
        if inputs.shape[1] > self.shape.max_sequence_length:
            limit = self.shape.max_sequence_length
            raise ValueError(
                f"a sequence of {inputs.shape[1]} tokens passes max_sequence_length={limit}"
            )
        return torch.arange(inputs.shape[1], device=inputs.device)

    def _window_mask(self, positions_T: Tensor) -> Tensor | None:
        """[T, T] for a window shorter than the sequence; else None, which lets torch use its fast
        causal kernel.
        """
        window = self.shape.sliding_window
        if window is None or window >= len(positions_T):
            return None
        return may_look(positions_T[:, None], positions_T, window)

    def _embed(self, tokens_BT: Tensor, positions: Tensor) -> Tensor:
        hidden_BTD: Tensor = self.token_embedding(tokens_BT)
        return (
            hidden_BTD + self.position_embedding(positions)
            if self.shape.position == "learned"
            else hidden_BTD
        )

    def _run_blocks(
        self,
        hidden_BTD: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        step: CacheStep | None,
    ) -> Tensor:
        rotation = None
        if self.shape.position == "rope":
            cos, sin = rotation_of(positions, self.shape.head_width, self.shape.rope_theta)
            rotation = (cos.unsqueeze(-3), sin.unsqueeze(-3))  # one angle for all heads
        recompute = self.recompute and torch.is_grad_enabled() and cache is None
        for block in self.blocks.values():
            if recompute:
                # Nothing in a block is random, so there is no random state to keep.
                hidden_BTD = checkpoint(
                    block, hidden_BTD, rotation, mask, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_BTD = block(hidden_BTD, rotation, mask, cache, step)
        return hidden_BTD

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for the layers held here; `capacity` tokens a row, at most
        max_sequence_length.
        """
        if capacity > self.shape.max_sequence_length:
            raise ValueError(
                f"a cache of {capacity} tokens passes max_sequence_length={self.shape.max_sequence_length}"
            )
        parameter = next(self.parameters())
        return KVCache(
            [int(name) for name in self.blocks],
            batch_size,
            capacity,
            kv_heads=self.shape.kv_heads,
            head_width=self.shape.head_width,
            dtype=parameter.dtype,
            device=parameter.device,
        )

    def init_rule(self, name: str, parameter: Tensor) -> Init:
        """GPT-2's rule: 0.02, and less for what is added to the residual stream, which `2 x layers`
        parts add to.
        """
        if name.endswith(".bias"):
            return Init("zeros")
        if name.endswith("norm.weight"):
            return Init("ones")
        if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
            return Init("normal", 0.02 / math.sqrt(2 * self.shape.layers))
        return Init("normal", 0.02)


def build(
    spec: ModelSpec,
    first_layer: int = 0,
    last_layer: int | None = None,
    has_embedding: bool = True,
    has_head: bool = True,
    *,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int | None,
    head_width: int | None,
    ffn_width: int | None,
    max_sequence_length: int,
    position: Literal["rope", "learned"],
    norm: Literal["rmsnorm", "layernorm"],
    activation: Literal["swiglu", "gelu"],
    tie_embeddings: bool,
    attention_bias: bool | Literal["qkv"],
    mlp_bias: bool,
    qk_norm: bool,
    sliding_window: int | None,
    rope_theta: float,
    norm_eps: float,
) -> Decoder:
    """The decoder for `spec`, or the stretch of it that the parameters before the star ask for.

    Raises ConfigError with every problem found.
    """
    if spec.sequence_length is None:
        raise ConfigError(
            "a gpt model reads tokens, but the data gives features; use data=python_stdlib or data=text"
        )
    if spec.sequence_length > max_sequence_length:
        raise ConfigError(
            f"data.sequence_length={spec.sequence_length} is more than "
            f"model.max_sequence_length={max_sequence_length}; lower the first or raise the second"
        )
    if head_width is None and (heads < 1 or width % heads):
        raise ConfigError(
            f"model.heads={heads}: must divide model.width={width}, or set model.head_width"
        )
    shape = DecoderShape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_width=width // heads if head_width is None else head_width,
        ffn_width=default_ffn_width(width, activation) if ffn_width is None else ffn_width,
        max_sequence_length=max_sequence_length,
        position=position,
        norm=norm,
        activation=activation,
        tie_embeddings=tie_embeddings,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        sliding_window=sliding_window,
        rope_theta=rope_theta,
        norm_eps=norm_eps,
    )
    return Decoder(shape, spec.num_outputs, first_layer, last_layer, has_embedding, has_head)
