"""Which rank holds which layers of a model that is trained in stages, for ranks and for the dry run
alike: the sizes of its parts. The cut itself is parts/placement.py's.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", 2019.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from smolrun.collectives.api import Collectives
from smolrun.data.splits import Batch
from smolrun.errors import ConfigError
from smolrun.models.base import StagedModel
from smolrun.models.shape import model_bytes
from smolrun.parts.optimizer_state import shapes_of
from smolrun.parts.placement import checked_layers, cut
from smolrun.parts.precision import Precision
from smolrun.parts.replicas import model_tensors, persistent_buffers
from smolrun.parts.step_clock import StepClock

_PROBE_TOKENS = 128
_PROBE_S = 0.5
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


def measured_speeds(
    model: nn.Module,
    run: Callable[[nn.Module, Batch], Tensor],
    clock: StepClock,
    collectives: Collectives,
) -> list[float]:
    """How fast each rank computes a layer, forward and backward, relative to the fastest; on all
    ranks alike. `run(layer, batch)` goes forward. In steps of a quarter: of machines that differ by
    less, a measurement of a second cannot say which one is faster."""
    if not isinstance(model, StagedModel):
        return []  # it will be refused
    own_s = torch.tensor([_layer_s(model, run, clock)], dtype=torch.float64)
    seconds = torch.zeros(collectives.size, dtype=torch.float64)
    collectives.all_gather(seconds, own_s)
    return [1.25 ** round(math.log(float(seconds.min()) / one, 1.25)) for one in seconds.tolist()]


def _layer_s(
    model: StagedModel, run: Callable[[nn.Module, Batch], Tensor], clock: StepClock
) -> float:
    """The model stays as it is: copied are modules and buffers, without the parameters' values."""
    assert isinstance(model, nn.Module), "it is one"
    hollow = {id(own): nn.Parameter(own.detach(), own.requires_grad) for own in model.parameters()}
    layer = copy.deepcopy(model, hollow)
    layer.keep_stage(range(1), False, False)
    for parameter in layer.parameters():
        parameter.data = torch.full_like(parameter, 0.01, memory_format=torch.contiguous_format)
    tokens = min(_PROBE_TOKENS, model.shape.max_sequence_length)
    hidden = torch.ones(1, tokens, model.shape.width, requires_grad=True)
    times: list[float] = []
    while len(times) < 3 or sum(times) < _PROBE_S:
        began_s = time.perf_counter()
        with clock.compute():  # an emulated machine takes longer
            run(layer, Batch(hidden, hidden)).sum().backward()
            assert hidden.grad is not None
            hidden.grad.zero_()
        times.append(time.perf_counter() - began_s)
    clock.take()
    return min(times)


def without_values(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that is about to be cut, by name."""
    return {
        name: nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        for name, tensor in model_tensors(model)
    }


def cut_text(layers: Sequence[range], notes: Sequence[str] = (), replicas: int = 1) -> str:
    """Such as rank 0 layers 0 to 4, rank 1 layer 5; `notes` stand behind the ranks. With several
    replicas of the pipeline: ranks 0, 2 layers 0 to 4, ranks 1, 3 layer 5."""
    size = len(layers) * replicas
    noted = [f"{rank}{note}" for rank, note in enumerate(notes or [""] * size)]
    what = "ranks" if replicas > 1 else "rank"
    return ", ".join(
        f"{what} {', '.join(noted[stage :: len(layers)])} {layers_text(held)}"
        for stage, held in enumerate(layers)
    )


def layers_text(stage: range) -> str:
    """Such as layers 0 to 4."""
    if len(stage) == 1:
        return f"layer {stage[0]}"
    return f"layers {stage[0]} to {stage[-1]}"


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
