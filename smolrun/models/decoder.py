"""One readable decoder that is GPT-2, Llama, Qwen2, Qwen3, Mistral or SmolLM by its keys.

    tokens -> token_embedding [+ position_embedding] -> blocks[0] .. blocks[n - 1] -> norm -> head
              has_embedding                             first_layer .. last_layer     has_head

Any stage of it can be built alone, as in pipeline parallelism; a parameter has the same name in
every stage. With tied embeddings the stage with the head also holds `token_embedding.weight`: then
the first and the last stage share a parameter, whose gradients must be summed. The decoder knows
nothing of ranks: the caller sends hidden_BTD from stage to stage.

Shape suffixes: B batch, T tokens, S keys, D width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smolrun.errors import ConfigError
from smolrun.models.attention import Attention, AttentionInputs, rotation_of
from smolrun.models.base import Init, Kind, ModelSpec
from smolrun.models.feed_forward import FeedForward, MixtureOfExperts, Routing
from smolrun.models.kv_cache import KVCache, may_look
from smolrun.models.shape import DecoderShape, completed_shape


def norm_of(shape: DecoderShape) -> nn.Module:
    """A new norm over the width."""
    kind = nn.LayerNorm if shape.norm == "layernorm" else nn.RMSNorm
    return kind(shape.width, eps=shape.norm_eps)


class Block(nn.Module):
    """Attention, then feed-forward or experts; each reads a normed copy and adds to the residual
    stream."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm_of(shape)
        self.attention = Attention(shape, layer)
        self.feed_forward_norm = norm_of(shape)
        kind = FeedForward if shape.moe is None else MixtureOfExperts
        self.feed_forward = kind(shape)

    def forward(self, hidden_BTD: Tensor, shared: AttentionInputs) -> tuple[Tensor, Routing | None]:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), shared)
        added, routing = self.feed_forward(self.feed_forward_norm(hidden_BTD)), None
        if isinstance(added, tuple):
            added, routing = added
        return hidden_BTD + added, routing


class Decoder(nn.Module):
    """Layers first_layer .. last_layer (both included), with or without embedding and head."""

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
            known = f"0..{shape.layers - 1}"
            raise ValueError(f"layers {first_layer}..{last_layer} are not within {known}")
        self.shape = shape
        self.vocab_size = vocab_size
        self.has_embedding, self.has_head = has_embedding, has_head
        # True: keep only each block's input for backward and compute the rest again then.
        self.recompute = False
        self.routing: dict[str, Routing] = {}  # of the last forward, by layer: what experts got
        if has_embedding or (has_head and shape.tie_embeddings):
            self.token_embedding = nn.Embedding(vocab_size, shape.width)
        if has_embedding and shape.position == "learned":
            self.position_embedding = nn.Embedding(shape.max_sequence_length, shape.width)
        layers = range(first_layer, last_layer + 1)
        self.blocks = nn.ModuleDict({str(layer): Block(shape, layer) for layer in layers})
        if has_head:
            self.norm = norm_of(shape)
            if not shape.tie_embeddings:
                self.head = nn.Linear(shape.width, vocab_size, bias=False)

    def keep_stage(self, layers: range, has_embedding: bool, has_head: bool) -> None:
        """Drops what is outside of a stage, in place; as if it had been built alone."""
        self.has_embedding, self.has_head = has_embedding, has_head
        for name in [name for name in self.blocks if int(name) not in layers]:
            del self.blocks[name]
        if not has_embedding and hasattr(self, "position_embedding"):
            del self.position_embedding
        if not has_embedding and not (has_head and self.shape.tie_embeddings):
            del self.token_embedding
        if not has_head:
            del self.norm
        if not has_head and not self.shape.tie_embeddings:
            del self.head

    @property
    def tied_parameter(self) -> str | None:
        """The parameter that both the first and the last stage hold."""
        return "token_embedding.weight" if self.shape.tie_embeddings else None

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """Of the last forward, [B]: the losses of all routers held here for each sequence."""
        losses = [routing.auxiliary_B for routing in self.routing.values()]
        return torch.stack(losses).sum(0) if losses else None

    def forward(
        self, inputs: Tensor, cache: KVCache | None = None, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Token ids [B, T] to logits [B, T, V].

        A stage without embedding takes hidden [B, T, D]; one without head returns it. With a
        cache the inputs continue its sequences, and `counts[row]` is how many of a row's T
        inputs are real, the rest being padding on the right (None: all are real). Raises
        ValueError for a sequence longer than max_sequence_length or than the cache.
        """
        window = self.shape.sliding_window
        if cache is None:
            step = None
            positions = self._positions(inputs)
            mask = self._window_mask(positions)
        else:
            step = cache.plan(inputs.shape[1], counts, window)
            positions, mask = step.positions_BT, step.mask_B1TS
        hidden_BTD = self._embed(inputs, positions) if self.has_embedding else inputs
        hidden_BTD = self._run_blocks(
            hidden_BTD, AttentionInputs(self._rotation(positions), mask, step)
        )
        if step is not None:
            step.finish()
        if not self.has_head:
            return hidden_BTD
        head = self.token_embedding if self.shape.tie_embeddings else self.head
        return F.linear(self.norm(hidden_BTD), head.weight)

    def _positions(self, inputs: Tensor) -> Tensor:
        """0 .. T-1, for a call without a cache."""
        length, limit = inputs.shape[1], self.shape.max_sequence_length
        if length > limit:
            raise ValueError(f"a sequence of {length} tokens passes max_sequence_length={limit}")
        return torch.arange(length, device=inputs.device)

    def _window_mask(self, positions_T: Tensor) -> Tensor | None:
        """[T, T] if the window hides anything; else None, for torch's fast causal kernel."""
        window = self.shape.sliding_window
        if window is None or window >= len(positions_T):
            return None
        return may_look(positions_T[:, None], positions_T, window)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.shape.position == "learned":
            return None
        shape = self.shape
        cos, sin = rotation_of(positions, shape.head_width, shape.rope_theta, shape.rope_scaling)
        return cos.unsqueeze(-3), sin.unsqueeze(-3)  # the same for all heads

    def _embed(self, tokens_BT: Tensor, positions: Tensor) -> Tensor:
        hidden_BTD: Tensor = self.token_embedding(tokens_BT)
        if self.shape.position == "learned":
            hidden_BTD = hidden_BTD + self.position_embedding(positions)
        return hidden_BTD

    def _run_blocks(self, hidden_BTD: Tensor, shared: AttentionInputs) -> Tensor:
        recompute = self.recompute and torch.is_grad_enabled() and shared.step is None
        self.routing = {}
        for layer, block in self.blocks.items():
            if recompute:
                # Nothing in a block is random, so there is no random state to keep for later.
                hidden_BTD, routing = checkpoint(
                    block, hidden_BTD, shared, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_BTD, routing = block(hidden_BTD, shared)
            if routing is not None:
                self.routing[layer] = routing
        return hidden_BTD

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for the layers held here, with room for `capacity` tokens a row.

        Raises ValueError if the capacity is more than max_sequence_length.
        """
        limit = self.shape.max_sequence_length
        if capacity > limit:
            raise ValueError(f"a cache of {capacity} tokens passes max_sequence_length={limit}")
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
        """GPT-2's rule: 0.02, and less for what each of 2 x layers parts adds to the residual."""
        if name.endswith(".bias"):
            return Init("zeros")
        if name.endswith("norm.weight"):
            return Init("ones")
        if name.endswith(("attention.output.weight", ".down.weight")):
            return Init("normal", 0.02 / math.sqrt(2 * self.shape.layers))
        return Init("normal", 0.02)


def build(
    spec: ModelSpec,
    first_layer: int = 0,
    last_layer: int | None = None,
    has_embedding: bool = True,
    has_head: bool = True,
    *,
    vocab_size: int | None,
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
    rope_scaling: Mapping[str, float] | None,
    norm_eps: float,
    moe: Mapping[str, Any] | None,
) -> Decoder:
    """The decoder for `spec`, or the stage of it that the parameters before the star ask for.

    The keys are explained in conf/model/gpt_tiny.yaml and moe_tiny.yaml. Raises ConfigError with
    every problem.
    """
    _check_fit(spec, max_sequence_length, vocab_size)
    shape = completed_shape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn_width=ffn_width,
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
        rope_scaling=rope_scaling,
        norm_eps=norm_eps,
        moe=moe,
    )
    num_outputs = vocab_size or spec.num_outputs
    return Decoder(shape, num_outputs, first_layer, last_layer, has_embedding, has_head)


def _check_fit(spec: ModelSpec, max_sequence_length: int, vocab_size: int | None) -> None:
    if spec.sequence_length is None:
        raise ConfigError(
            "a gpt model reads tokens, but the data gives features; "
            "use data=python_stdlib or data=text"
        )
    if spec.sequence_length > max_sequence_length:
        raise ConfigError(
            f"data.sequence_length={spec.sequence_length} is more than "
            f"model.max_sequence_length={max_sequence_length}; lower the first or raise the second"
        )
    if vocab_size is not None and vocab_size < spec.num_outputs:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is less than the {spec.num_outputs} tokens of the "
            "data's tokenizer; leave it null, or take a smaller vocabulary"
        )
