"""transformers' own model as a torch module: token ids in, logits out.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smolrun.errors import ConfigError
from smolrun.models.base import Kind

_DROPOUT_ENDINGS = ("dropout", "pdrop", "dropout_prob", "dropout_rate", "layerdrop")


class HuggingFaceNetwork(nn.Module):
    """Wraps a causal model of transformers; parameters are called `network.<their own name>`."""

    consumes: ClassVar[Kind] = "tokens"

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        # It comes out of from_pretrained in eval mode, in which it never recomputes.
        self.train()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V]; V may be more than the tokenizer has."""
        logits_BTV: Tensor = self.network(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV

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
        if not pretrained or torch.get_default_device().type == "meta":
            return HuggingFaceNetwork(
                AutoModelForCausalLM.from_config(
                    config, trust_remote_code=False, attn_implementation=choice, dtype=torch.float32
                )
            )
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
