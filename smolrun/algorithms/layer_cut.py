"""Which rank holds which layers of a model that is trained in stages, for ranks and for the dry run
alike: the sizes of its parts. The cut itself is parts/placement.py's.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from smolrun.errors import ConfigError
from smolrun.models.base import StagedModel
from smolrun.models.shape import model_bytes
from smolrun.parts.optimizer_state import shapes_of
from smolrun.parts.placement import checked_layers, cut
from smolrun.parts.precision import Precision
from smolrun.parts.replicas import model_tensors, persistent_buffers

_CAN_BE_CUT = "smolrun's decoders (model=gpt_tiny, ...), and gpt2, llama, qwen by model=hf,"


def copies_held(
    make_optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    precision: Precision,
    staleness: int,
) -> int:
    """How often a rank has memory for its weights: themselves, gradients, state of the
    optimizer."""
    weight = nn.Parameter(torch.empty(2, 2, dtype=precision.parameters))
    state = shapes_of(make_optimizer([("weight", weight)]), weight)
    return 2 + staleness + sum(shape == tuple(weight.shape) for shape in state.values())


def cut_layers(
    model: nn.Module,
    layers: Sequence[Sequence[int]] | None,
    num_stages: int,
    *,
    precision: Precision,
    copies: int,
    speeds: Sequence[float] = (),
    memory_bytes: Sequence[float] = (),
) -> list[range]:
    """The layers of every stage: as given, or so that the slowest stage is as fast as possible and
    every stage fits into its rank's memory. `copies` is `copies_held`; no speeds: all alike; no
    bytes: without limit. ConfigError where that cannot be."""
    if not isinstance(model, StagedModel):
        raise ConfigError(
            f"{type(model).__name__} cannot be cut between its layers; {_CAN_BE_CUT} can"
        )
    sizes = model_bytes(model.shape, model.vocab_size, precision.parameters.itemsize)
    if num_stages > sizes.layers:
        raise ConfigError(
            f"the model has {sizes.layers} layers, too few for {num_stages} ranks: every rank "
            f"needs one; take cluster.ranks={sizes.layers}, or a model with more model.layers"
        )
    if layers is not None:
        return _given(layers, sizes.layers, num_stages)
    # Products with a layer's matrices are what takes time; rows of an embedding are looked up.
    costs = [float(sizes.layer)] * sizes.layers
    costs[-1] += sizes.head
    held = [float(copies * sizes.layer)] * sizes.layers
    # A tied embedding: the first stage also receives a gradient of it, the last one has values,
    # gradient and the new values that it receives.
    tied = sizes.shared if num_stages > 1 else 0
    held[0] += copies * sizes.embedding + tied
    held[-1] += copies * (sizes.head - tied) + 3 * tied
    found = cut(
        costs,
        speeds or [1.0] * num_stages,
        sizes=held,
        limits=memory_bytes or None,
        shared_size=copies * sizes.shared,
    )
    if found is None:
        free = ", ".join(f"{limit / 2**30:.1f} GB" for limit in memory_bytes)
        raise ConfigError(
            f"the model needs {copies * sizes.weights / 2**30:.1f} GB for weights, gradients and "
            f"optimizer, and no cut fits the ranks' memory_gb ({free}); add hosts, or take "
            "optimizer=lion or precision=bf16_params"
        )
    return found.layers


def without_values(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that is about to be cut, by name."""
    return {
        name: nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        for name, tensor in model_tensors(model)
    }


def check_stage(model: nn.Module, rank: int) -> None:
    """ConfigError for a stage that cannot be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"rank {rank} would have nothing to train: all parameters of its layers are frozen; "
            "set algorithm.layers so that each rank has some that are not"
        )
    if buffers := sorted(persistent_buffers(model)):
        raise ConfigError(
            f"the model has buffers ({', '.join(buffers[:3])}): a forward of one stage may "
            "change them unseen by the others; take algorithm=fsdp or classicdp"
        )


def _given(layers: Sequence[Sequence[int]], num_layers: int, num_stages: int) -> list[range]:
    written = str([list(stage) for stage in layers]).replace(" ", "")
    try:
        stages = checked_layers(layers, num_layers, num_stages)
    except ValueError as error:
        raise ConfigError(f"algorithm.layers={written}: {error}") from None
    if not all(stages):
        raise ConfigError(f"algorithm.layers={written}: every rank needs a layer")
    return stages
