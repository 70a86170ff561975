"""The state of optimizers by the names of parameters: shapes, reading, memory to load it into.

Knows the optimizers by the names of their classes only; training/optimizer.py makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from smolrun.errors import CheckpointError

UPDATES = "updates"  # how many times a parameter was updated; counted where updates are rounded


def state_shapes(
    name: str, shape: Sequence[int], *, has_momentum: bool = True, is_rounded: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shapes of the state of optimizer `name` after the first update of a parameter of `shape`.

    `has_momentum` counts for sgd alone; `is_rounded`: the parameter is in bfloat16.
    """
    whole = tuple(shape)
    shapes: dict[str, tuple[int, ...]] = {}
    if name in ("adamw", "adafactor"):
        shapes["step"] = ()
    if name == "adamw":
        shapes |= {"exp_avg": whole, "exp_avg_sq": whole}
    elif name == "lion":
        shapes["exp_avg"] = whole
    elif name == "sgd" and has_momentum:
        shapes["momentum_buffer"] = whole
    elif name == "adafactor" and len(whole) > 1:
        shapes |= {"row_var": (*whole[:-1], 1), "col_var": (*whole[:-2], 1, whole[-1])}
    elif name == "adafactor":
        shapes["variance"] = whole
    if is_rounded:
        shapes[UPDATES] = ()
    return shapes


def optimizer_state(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's state by "<state name>/<parameter name>"; empty before the first update.

    The tensors are the optimizer's own, not copies; numbers come as tensors without dimensions.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                state[f"{key}/{name}"] = torch.as_tensor(value).detach()
    return state


def init_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Gives a new optimizer the state that it has after an update, of zeros: memory to load a
    checkpoint into. `dtypes` are those of the checkpoint, by "<state name>/<parameter name>"; none
    at all is a checkpoint from before the first update. CheckpointError, with nothing changed, for
    names that are missing or foreign."""
    wanted = {
        f"{key}/{name}": (key, parameter, shape)
        for name, parameter in named_parameters
        if parameter.requires_grad
        for key, shape in shapes_of(optimizer, parameter).items()
    }
    _check_names(set(wanted), set(dtypes))
    state: dict[Tensor, dict[str, Tensor]] = {}
    for path, dtype in dtypes.items():
        key, parameter, shape = wanted[path]
        device = _device_of(optimizer, parameter, key)
        state.setdefault(parameter, {})[key] = torch.zeros(shape, dtype=dtype, device=device)
    optimizer.state.clear()
    optimizer.state.update(state)


def _check_names(wanted: set[str], found: set[str]) -> None:
    """Nothing at all is right too: a checkpoint from before the first update."""
    missing, foreign = sorted(wanted - found) if found else [], sorted(found - wanted)
    problems = []
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if foreign:
        problems.append(f"has {_some(foreign)}, which this run does not know")
    if problems:
        raise CheckpointError(
            f"the optimizer state of the checkpoint {' and '.join(problems)}; "
            "resume with the model and optimizer that were saved"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def expected_bytes(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]
) -> int:
    """Bytes of the optimizer's state after its first update."""
    return sum(
        math.prod(shape) * (parameter.itemsize if shape == tuple(parameter.shape) else 4)
        for parameter in parameters
        if parameter.requires_grad
        for shape in shapes_of(optimizer, parameter).values()
    )


def shapes_of(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter
) -> dict[str, tuple[int, ...]]:
    """`state_shapes` of a parameter of this optimizer."""
    inner = getattr(optimizer, "inner", None)  # of a StochasticRounding
    name = type(optimizer if inner is None else inner).__name__.lower()
    is_rounded = inner is not None
    has_momentum = bool(optimizer.param_groups[0].get("momentum"))
    return state_shapes(name, parameter.shape, has_momentum=has_momentum, is_rounded=is_rounded)


def _device_of(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, key: str
) -> torch.device:
    """Where torch itself keeps it: counters stay on the CPU unless a fused kernel reads them."""
    is_fused = bool(optimizer.param_groups[0].get("fused"))
    if key == UPDATES or (key == "step" and not is_fused):
        return torch.device("cpu")
    return parameter.device
