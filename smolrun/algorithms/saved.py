"""What a checkpoint holds of an algorithm whose ranks all hold the same: everything, dealt out.

    model/<name>                 parameters and buffers
    optimizer/<state>/<name>     what the optimizer remembers of each parameter
    in_flight/<n>/<name>         summed gradients that no update has used yet, oldest first
    in_flight/<n>/facts          and the sums that came with them

Keys are names, never ranks or positions, so that any other number of ranks can go on. Each rank
writes a part of the keys: together they write everything once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from smolrun.algorithms.contract import FACTS, PendingUpdate
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.errors import CheckpointError
from smolrun.parts.optimizer_state import expected_bytes as optimizer_bytes
from smolrun.parts.optimizer_state import load_optimizer_state, optimizer_state
from smolrun.parts.replicas import persistent_buffers

if TYPE_CHECKING:
    from smolrun.algorithms.base import Algorithm


def tensors(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    """Everything by key; the tensors are the living ones."""
    model = algorithm.model
    found = {f"model/{name}": tensor for name, tensor in model_tensors(model)}
    remembered = optimizer_state(algorithm.optimizer, model.named_parameters())
    found |= {f"optimizer/{key}": tensor for key, tensor in remembered.items()}
    for number, pending in enumerate(algorithm.pending_updates):
        found |= dict(_flight_tensors(algorithm, number, pending))
        found[f"in_flight/{number}/facts"] = pending.facts
    return found


def model_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, each tensor once, without buffers that are made anew."""
    yield from model.named_parameters()
    yield from persistent_buffers(model).items()


def dealt(whole: Mapping[str, torch.Tensor], size: int, index: int) -> list[TensorSlice]:
    """The part of `whole` that rank `index` of `size` writes: the largest first, each to whom has
    least."""
    loads = [0] * size
    mine = []
    for key in sorted(whole, key=lambda key: (-whole[key].nbytes, key)):
        owner = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owner] += whole[key].nbytes
        if owner == index:
            mine.append(key)
    return [
        TensorSlice(key, tuple(whole[key].shape), 0, whole[key].detach()) for key in sorted(mine)
    ]


def expected_bytes(algorithm: Algorithm) -> int:
    """About how large a checkpoint will be, all ranks together."""
    trained = [p for p in algorithm.model.parameters() if p.requires_grad]
    held = sum(tensor.nbytes for _, tensor in model_tensors(algorithm.model))
    late = algorithm.context.staleness * sum(p.nbytes for p in trained)
    return held + late + optimizer_bytes(algorithm.optimizer, trained)


def state(algorithm: Algorithm) -> dict[str, Any]:
    """Numbers beside the tensors."""
    scale = algorithm.loss_scale
    return {
        "steps_begun": algorithm.steps_begun,
        "in_flight": [pending.step for pending in algorithm.pending_updates],
        "loss_scale": {"value": scale.value, "good_steps": scale.good_steps},
        "buffers_change": algorithm.buffers_change,
    }


@torch.no_grad()
def restore(algorithm: Algorithm, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
    """Puts everything back; CheckpointError names what is missing, unknown or of another shape."""
    for name, tensor in model_tensors(algorithm.model):
        read_into(tensor, checkpoint, f"model/{name}")
    refuse_unknown(algorithm, checkpoint)
    prefix = "optimizer/"
    load_optimizer_state(
        algorithm.optimizer,
        algorithm.model.named_parameters(),
        {key.removeprefix(prefix): checkpoint.read(key) for key in checkpoint.keys(prefix)},
    )
    restore_numbers(algorithm, checkpoint, state)
    for number, pending in enumerate(restore_flights(algorithm, checkpoint, state)):
        for key, tensor in _flight_tensors(algorithm, number, pending):
            read_into(tensor, checkpoint, key)


def refuse_unknown(algorithm: Algorithm, checkpoint: CheckpointReader) -> None:
    """CheckpointError for a tensor that the model does not have."""
    known = {f"model/{name}" for name, _ in model_tensors(algorithm.model)}
    if unknown := [key for key in checkpoint.keys("model/") if key not in known]:
        raise CheckpointError(f"{checkpoint.folder} is of another model: it has {unknown[0]}")


def restore_numbers(
    algorithm: Algorithm, checkpoint: CheckpointReader, state: Mapping[str, Any]
) -> None:
    """Puts back what is not in tensors."""
    algorithm.loss_scale.value = state["loss_scale"]["value"]
    algorithm.loss_scale.good_steps = state["loss_scale"]["good_steps"]
    algorithm.steps_begun = state["steps_begun"]
    algorithm.buffers_change = state.get("buffers_change", False)  # older checkpoints: not known
    # Fewer is right too: a run that came to its end has applied them all.
    if len(state["in_flight"]) > algorithm.context.staleness:
        raise CheckpointError(
            f"{checkpoint.folder} has {len(state['in_flight'])} gradients in flight, more than "
            f"staleness.bound = {algorithm.context.staleness}; go on with the bound that it had"
        )


def restore_flights(
    algorithm: Algorithm, checkpoint: CheckpointReader, state: Mapping[str, Any]
) -> Iterator[PendingUpdate]:
    """The updates one by one, with their facts; whoever asks fills in their gradients."""
    for number, step in enumerate(state["in_flight"]):
        facts = _facts(checkpoint.read(f"in_flight/{number}/facts"), algorithm.collectives.size)
        pending = PendingUpdate(step, facts, [])
        algorithm.pending_updates.append(pending)
        yield pending


def _flight_tensors(
    algorithm: Algorithm, number: int, pending: PendingUpdate
) -> Iterator[tuple[str, torch.Tensor]]:
    names = [name for name, p in algorithm.model.named_parameters() if p.requires_grad]
    for name, gradient in zip(names, algorithm.pending_gradients(pending), strict=True):
        yield f"in_flight/{number}/{name}", gradient


def _facts(saved: torch.Tensor, size: int) -> torch.Tensor:
    """The facts of a pending for `size` ranks, which need not be as many as wrote them.

    Only sums, "all were finite", whether forward changes buffers and whose are taken matter now:
    who was slow, or asked to stop, was another run.
    """
    table = torch.zeros((size, len(FACTS)), dtype=torch.float64)
    # Older checkpoints do not have the last column, changed_buffer.
    before, now = (dict(zip(FACTS, facts.T, strict=False)) for facts in (saved, table))
    for name in ("loss_sum", "weight"):
        now[name][0] = before[name].sum()
    now["is_finite"][:] = before["is_finite"].min()
    now["changed_buffer"][:] = before.get("changed_buffer", torch.zeros(1)).max()
    both = min(len(saved), size)
    now["samples"][:both] = before["samples"][:both]
    return table


def read_into(tensor: torch.Tensor, checkpoint: CheckpointReader, key: str) -> None:
    """Fills a whole tensor; CheckpointError where the checkpoint has no such one."""
    if key not in checkpoint.manifest.tensors:
        raise CheckpointError(f"{checkpoint.folder} is of another model: it has no {key}")
    value = checkpoint.read(key)
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise CheckpointError(
            f"{checkpoint.folder} is of another model: {key} is {tuple(value.shape)} of "
            f"{value.dtype}, not {tuple(tensor.shape)} of {tensor.dtype}"
        )
    tensor.copy_(value)
