"""Optimizers by name, and their state by parameter name. Matrices decay, vectors (norms, biases) do
not.

    adamw      float32: 8 bytes of state per parameter; bf16: 4
    lion       float32: 4;  bf16: 2
    sgd        float32: 4;  bf16: 2 (0 without momentum)
    adafactor  next to nothing: one number per row and per column of a matrix

Parameters in bfloat16 are updated in float32, piece by piece, and rounded by chance; see
rounding.py.

Source: Kingma & Ba 2015, Loshchilov & Hutter 2019 (AdamW); Shazeer & Stern 2018 (Adafactor, as
torch.optim builds it: lr is the largest step relative to the size of the weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smolrun.errors import CheckpointError
from smolrun.training.lion import Lion
from smolrun.training.rounding import UPDATES, StochasticRounding

NAMES = ("adamw", "adafactor", "lion", "sgd")
# Adafactor looks at whole matrices; the others treat every number by itself.
_ELEMENTWISE = frozenset({"adamw", "lion", "sgd"})


def make_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    name: str,
    *,
    seed: int = 0,
    **keys: Any,
) -> torch.optim.Optimizer:
    """The optimizer `name` with the keys of its yaml; `weight_decay` applies to tensors of 2 and
    more dimensions, `seed` to the rounding of bfloat16 parameters."""
    names = {parameter: key for key, parameter in named_parameters if parameter.requires_grad}
    decay = keys.pop("weight_decay", 0.0)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in names if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in names if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    first = next(iter(names))
    make = _maker(name, first.device.type, keys)
    if first.dtype != torch.bfloat16:
        return make(groups)
    return StochasticRounding(
        groups, make, names=names, seed=seed, is_elementwise=name in _ELEMENTWISE
    )


def _maker(
    name: str, device: str, keys: dict[str, Any]
) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    if name == "adamw":
        # The fused kernel goes over memory once where the plain one goes over it a dozen times.
        fused = device in ("cpu", "cuda")
        return lambda groups: torch.optim.AdamW(groups, fused=fused, **keys)
    if name == "sgd":
        return lambda groups: torch.optim.SGD(groups, **keys)
    if name == "lion":
        return lambda groups: Lion(groups, **keys)
    if name == "adafactor":
        # One matrix after the other: `foreach` would need a second copy of the whole model.
        return lambda groups: torch.optim.Adafactor(groups, foreach=False, **keys)
    raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(NAMES)}")


def state_shapes(
    name: str, shape: Sequence[int], *, has_momentum: bool = True, is_rounded: bool = False
) -> dict[str, tuple[int, ...]]:
    """What optimizer `name` remembers of a parameter of this shape, after its first update.

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
    """All that the optimizer remembers, as "<state name>/<parameter name>"; empty before the first
    update.

    The tensors are the optimizer's own, not copies; numbers come as tensors without dimensions.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                state[f"{key}/{name}"] = torch.as_tensor(value).detach()
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    state: Mapping[str, Tensor],
) -> None:
    """Gives a new optimizer the memory that `optimizer_state` told of; it goes on bit by bit.

    Reads each key once and copies, so that `state` may be a view of a file. CheckpointError, with
    nothing changed, for keys that are missing, foreign, or of another shape.
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    wanted = {
        f"{key}/{name}": (key, parameter, shape)
        for name, parameter in trained
        for key, shape in _shapes_of(optimizer, parameter).items()
    }
    _check_names(set(wanted), set(state))
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    for path in state:
        key, parameter, shape = wanted[path]
        value = state[path]
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"the optimizer's {path} has shape {tuple(value.shape)} in the checkpoint, but "
                f"{shape} in this run; resume with the model and optimizer that were saved"
            )
        device = _device_of(optimizer, parameter, key)
        loaded.setdefault(parameter, {})[key] = value.detach().to(device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(loaded)


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


def _shapes_of(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter
) -> dict[str, tuple[int, ...]]:
    is_rounded = isinstance(optimizer, StochasticRounding)
    inner = optimizer.inner if isinstance(optimizer, StochasticRounding) else optimizer
    name = type(inner).__name__.lower()
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
