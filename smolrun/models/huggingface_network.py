"""transformers' own model as a torch module: token ids in, logits out; or a stage of its layers.

Shape suffixes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from smolrun.errors import ConfigError
from smolrun.models.base import Kind
from smolrun.models.huggingface_conversion import decoder_keys_from_hf
from smolrun.models.huggingface_folder import stored_tensors
from smolrun.models.shape import DecoderShape, completed_shape

# Families whose models do nothing between layers, so that they can be cut there.
_HAS_STAGES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_DROPOUT_ENDINGS = ("dropout", "pdrop", "dropout_prob", "dropout_rate", "layerdrop")


class HuggingFaceNetwork(nn.Module):
    """Wraps a causal model of transformers; parameters are called `network.<their own name>`."""

    consumes: ClassVar[Kind] = "tokens"

    def __init__(self, network: Any, stored: StoredWeights | None = None) -> None:
        """`stored` are the weights of a network on the meta device."""
        super().__init__()
        self.network = network
        self.has_embedding = self.has_head = True
        # What a parameter starts from, where it is not in memory: for `build_shell`.
        self.stored_value: Callable[[str, Tensor], Tensor] | None = (
            None
            if stored is None
            else lambda name, it: stored.read(name.removeprefix("network."), it.shape)
        )
        # It comes out of from_pretrained in eval mode, in which it never recomputes.
        self.train()

    def forward(self, inputs: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, T, V]; V may be more than the tokenizer has. A stage
        without embedding takes hidden [B, T, D]; one without head returns it."""
        if self.has_embedding and self.has_head:
            logits_BTV: Tensor = self.network(input_ids=inputs, use_cache=False).logits
            return logits_BTV
        name = "input_ids" if self.has_embedding else "inputs_embeds"
        output = self.network.base_model(**{name: inputs}, use_cache=False)
        hidden_BTD: Tensor = output.last_hidden_state
        return self.network.lm_head(hidden_BTD) if self.has_head else hidden_BTD

    # -- as a StagedModel ----

    @property
    def shape(self) -> DecoderShape:
        """ConfigError for a family that cannot be cut."""
        family = self.network.config.model_type
        if family not in _HAS_STAGES:
            raise ConfigError(
                f"a model of the family {family} cannot be cut between its layers; those of "
                f"{', '.join(_HAS_STAGES)} can, or take algorithm=fsdp"
            )
        keys = decoder_keys_from_hf(self.network.config.to_dict())
        del keys["vocab_size"]
        return completed_shape(**keys)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.network.config.vocab_size)

    @property
    def tied_parameter(self) -> str | None:
        """The parameter that both the first and the last stage hold."""
        embedding = self.network.get_input_embeddings().weight
        if embedding is not self.network.get_output_embeddings().weight:
            return None
        return next(name for name, parameter in self.named_parameters() if parameter is embedding)

    def keep_stage(self, layers: range, has_embedding: bool, has_head: bool) -> None:
        """Drops what is outside of a stage, in place; other parts keep their names."""
        is_tied = self.tied_parameter is not None
        self.has_embedding, self.has_head = has_embedding, has_head
        base = self.network.base_model
        is_gpt2 = self.network.config.model_type == "gpt2"
        blocks = base.h if is_gpt2 else base.layers
        for index in range(len(blocks)):
            if index not in layers:
                blocks[index] = _OtherStage()
        if not has_head:
            setattr(base, "ln_f" if is_gpt2 else "norm", nn.Identity())
            self.network.lm_head = nn.Identity()
        if not has_embedding and not (has_head and is_tied):
            self.network.set_input_embeddings(nn.Identity())
        if not has_embedding and is_gpt2:
            base.wpe, base.drop = _NoPositions(), nn.Identity()

    def reset_buffers(self) -> None:
        """Computes the rotary tables of a network that was built on the meta device."""
        for module in self.modules():
            if module._buffers and hasattr(module, "rope_type"):
                fresh = type(module)(module.config)
                for name, buffer in fresh._buffers.items():
                    assert buffer is not None, name
                    module._buffers[name] = buffer.to(module._buffers[name].device)  # type: ignore[union-attr]

    @property
    def recompute(self) -> bool:
        """True: keep only each block's input for backward and compute the rest again then."""
        return any(getattr(part, "gradient_checkpointing", False) for part in self.modules())

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        if wanted and not self.network.supports_gradient_checkpointing:
            raise ConfigError(
                f"{type(self.network).__name__} cannot recompute its blocks; "
                "set training.recompute=false"
            )
        verb = "enable" if wanted else "disable"
        # transformers 5.23 gave it a new name; the old one goes with version 6.
        names = (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}")
        switch = next(getattr(self.network, name) for name in names if hasattr(self.network, name))
        switch(*([{"use_reentrant": False}] if wanted else []))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HuggingFaceNetwork:
        """As torch's, but rotary tables and the like stay in their own precision.

        transformers computes them anew in float32 whatever a model is loaded as; a cast of the
        whole module would round them, and with them every position.
        """
        tables = list(_tables(self))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, before in tables:
            after = module._buffers[name]
            if after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self


class _OtherStage(nn.Module):
    """In the place of a layer that another rank holds."""

    def forward(self, hidden_BTD: Tensor, *args: Any, **keys: Any) -> Tensor:
        return hidden_BTD


class _NoPositions(nn.Module):
    """In the place of the position embedding, which the first stage has added."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


class StoredWeights:
    """The tensors of a model folder by name, read one at a time when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored = stored_tensors(folder)

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """A new tensor; ConfigError where the folder lacks it or has another shape."""
        inner = name.removeprefix("transformer.")  # gpt2's own files have names without it
        found = name if name in self._stored else inner
        if found not in self._stored:
            raise ConfigError(f"the weights in {self._folder} lack {name}")
        if self._stored[found].shape != tuple(shape):
            raise ConfigError(f"the weights in {self._folder} have another shape for {name}")
        with safe_open(self._stored[found].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(found)
        return tensor


def load(folder: Path, *, pretrained: bool, attention: str, dropout: float) -> HuggingFaceNetwork:
    """The model in a folder; random values come from torch's default generator.

    Reads that folder and nothing else, runs no code of it. Raises ConfigError where transformers
    cannot build it, or where weights are missing or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    choice = None if attention == "auto" else attention
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _set_dropout(config, dropout)
        is_shell = torch.get_default_device().type == "meta"
        if not pretrained or is_shell:
            network = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, attn_implementation=choice, dtype=torch.float32
            )
            is_readable = pretrained and is_shell and config.model_type in _HAS_STAGES
            return HuggingFaceNetwork(network, StoredWeights(folder) if is_readable else None)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=choice,
            dtype="auto",
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise ConfigError(f"transformers cannot build the model in {folder}: {error}") from error
    network, info = loaded
    _refuse_gaps(folder, info)
    return HuggingFaceNetwork(network)


def _refuse_gaps(folder: Path, info: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers, and only warns."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(item[0]) for item in info["mismatched_keys"])
    if missing or mismatched:
        what = "lack" if missing else "have another shape for"
        first = (missing or mismatched)[0]
        count = len(missing or mismatched)
        raise ConfigError(f"the weights in {folder} {what} {first} ({count} such tensors)")


def _set_dropout(config: Any, dropout: float) -> None:
    """Every rate of the model, whatever its family calls it."""
    for key, value in config.to_dict().items():
        if key.endswith(_DROPOUT_ENDINGS) and isinstance(value, int | float):
            setattr(config, key, 0.0 if key.endswith("layerdrop") else dropout)
    inner = config.get_text_config()
    if inner is not config:
        _set_dropout(inner, dropout)


def _tables(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Computed float buffers that no checkpoint holds."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set
        and buffer is not None
        and buffer.is_floating_point()
        and not buffer.is_meta
    ]
