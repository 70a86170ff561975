"""Gives a model its first values: the same on every rank, for every layer range and every world
size.

A parameter's values depend on (seed, its name, its shape) and on nothing else, so a rank that
builds only layers 4..7 gets exactly what these layers would be in the whole model, and no rank ever
needs the whole.

A user's ordinary module has no `init_rule`. It cannot be filled from names, because its own
constructor decides how it starts. `build_model` therefore builds it for real on the CPU, with every
random generator seeded from `seed`: all ranks get equal values, at the price of memory for the
whole model on each of them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn

from smolrun.errors import ConfigError
from smolrun.models.base import HasInitRule, Init


def build_model(
    make: Callable[[], nn.Module], seed: int, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The model that `make` builds, on `device`, with its first values: the one door for the
    house's and users' models.

    `make` may be called twice: first under the meta device, which costs no memory; again for real
    if the model has no `init_rule`. Raises ConfigError with the reason if `make` cannot build the
    model.
    """
    with _seeded(seed):
        model = _on_meta(make)
    if isinstance(model, HasInitRule):
        return initialise(model, seed, dtype=dtype, device=device)
    with _seeded(seed):
        model = make()
    return model.to(device=device, dtype=dtype)


def initialise(
    model: nn.Module, seed: int, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Fills every parameter of a meta model, in place, and returns it.

    Values are drawn in float32 on the CPU, then cast, so every device and dtype starts from the
    same numbers. Buffers come from `model.reset_buffers()`, called once they are on `device`. A
    model that already holds values and has no `init_rule` keeps them and is only cast and moved;
    one without values and without `init_rule` raises ConfigError (see `build_model`).
    """
    if not isinstance(model, HasInitRule):
        _refuse_meta(model)
        return model.to(device=device, dtype=dtype)
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        value = draw(model.init_rule(name, parameter), name, parameter.shape, seed)
        filled[id(parameter)] = nn.Parameter(
            value.to(device=device, dtype=dtype), parameter.requires_grad
        )
    for module in model.modules():
        for key, slot in module._parameters.items():
            if (
                slot is not None
            ):  # a parameter shared by two modules stays shared: both find it under one id
                module._parameters[key] = filled[id(slot)]
    _place_buffers(model, device)
    return model


def draw(rule: Init, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The float32 CPU tensor that parameter `name` starts from."""
    if rule.kind == "zeros":
        return torch.zeros(shape)
    if rule.kind == "ones":
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # 63 bits: torch refuses seeds that do not fit a signed 64-bit integer on some devices.
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, rule.std, generator=generator)


def _place_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Moves the buffers to `device` and lets the model fill them; raises ConfigError if some stay
    without values.
    """
    if not hasattr(model, "reset_buffers"):
        _refuse_meta(model)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = (
                    torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                )
    if callable(reset := getattr(model, "reset_buffers", None)):
        reset()


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module | None:
    """The model without values, or None where its constructor needs real ones (it reads a file,
    calls item(), ...).
    """
    try:
        with torch.device("meta"):
            return make()
    except ConfigError:
        raise
    except Exception:  # a user's constructor may raise anything here; the real build that follows shows true errors
        return None


def _refuse_meta(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise ConfigError(
            f"{type(model).__name__} was built without values and does not say how {empty[0]!r} starts "
            f"({len(empty)} such tensors); give it `init_rule(name, parameter)` (and `reset_buffers()` for buffers), "
            "or build it through smolrun.models.initialise.build_model"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, all random generators a constructor may use start from `seed`; afterwards they are as
    before.
    """
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
