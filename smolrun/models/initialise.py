"""Gives a model its first values: equal on every rank, in every layer range and world size.

A parameter's values depend on (seed, its name, its shape) and on nothing else. So a rank that
builds only layers 4..7 gets exactly what they would be in the whole model, and no rank ever needs
the whole.

A user's ordinary module has no `init_rule` and cannot be filled from names, because its own
constructor decides how it starts. `build_model` therefore builds it for real on the CPU, with every
random generator seeded from `seed`: all ranks get equal values, at the price of memory for the
whole model on each of them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smolrun.errors import ConfigError
from smolrun.models.base import Init

_RANDOM_FILLS = ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_")


class _WithoutFills(TorchFunctionMode):
    """Random fills of meta tensors do nothing.

    torch runs them in Python, and imports torch._dynamo for that: 1.5 s and 70 MB a process.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM_FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules built in this block have shapes and dtypes, but no memory and no values."""
    with torch.device("meta"), _WithoutFills():
        yield


def build_model(
    make: Callable[[], nn.Module], seed: int, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The model that `make` builds, with its first values: one door for our and users' models.

    `make` may be called twice: first under the meta device, which costs no memory, and again for
    real if the model has no `init_rule`. What `make` raises for real is passed on.
    """
    with _seeded(seed):
        model = _on_meta(make)
    if model is not None and _rule_of(model) is not None:
        return initialise(model, seed, dtype=dtype, device=device)
    with _seeded(seed):
        model = make()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model's build returned a {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model.to(device=device, dtype=dtype)


def check_trainable(model: nn.Module) -> None:
    """ConfigError for a model of which nothing would be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"the model has nothing to train: none of its {len(list(model.parameters()))} "
            "parameters has requires_grad=True"
        )


def build_shell(
    make: Callable[[], nn.Module], seed: int, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """As `build_model`, but parameters only have shapes, and no memory: for who holds parts of them
    and asks `first_value` for one at a time. A model that cannot say them is built with values."""
    with _seeded(seed):
        model = _on_meta(make)
    if model is None or (_rule_of(model) is None and _stored_of(model) is None):
        return build_model(make, seed, dtype=dtype, device=device)
    hollow = {
        id(parameter): nn.Parameter(
            torch.zeros((), dtype=dtype, device=device).expand(parameter.shape),
            parameter.requires_grad,
        )
        for parameter in model.parameters()
    }
    _replace(model, hollow)
    _place_buffers(model, torch.device(device))
    return model


def first_value(model: nn.Module, name: str, parameter: nn.Parameter, *, seed: int) -> Tensor:
    """What a parameter of a shell starts from; of any other model, the value that it has."""
    rule_of, stored_of = _rule_of(model), _stored_of(model)
    is_hollow = parameter.untyped_storage().nbytes() < parameter.nbytes
    if is_hollow and stored_of is not None:
        return stored_of(name, parameter)
    if not is_hollow or rule_of is None:
        return parameter.detach()
    return draw(rule_of(name, parameter), name, parameter.shape, seed)


def initialise(
    model: nn.Module, seed: int, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Fills every parameter of a meta model, in place, and returns it.

    Values are drawn in float32 on the CPU, then cast, so every device and dtype starts from the
    same numbers. Buffers come from `model.reset_buffers()`, called once they are on `device`. A
    model that already holds values and has no `init_rule` keeps them and is only cast and moved;
    one without values and without `init_rule` raises ConfigError (see `build_model`).
    """
    rule_of = _rule_of(model)
    if rule_of is None:
        _refuse_meta(model)
        return model.to(device=device, dtype=dtype)
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        value = draw(rule_of(name, parameter), name, parameter.shape, seed)
        value = value.to(device=device, dtype=dtype)
        filled[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    _replace(model, filled)
    _place_buffers(model, torch.device(device))
    return model


def _replace(model: nn.Module, filled: dict[int, nn.Parameter]) -> None:
    """A parameter that two modules share stays shared: both find it under the same id."""
    for module in model.modules():
        for key, slot in module._parameters.items():
            if slot is not None:
                module._parameters[key] = filled[id(slot)]


def draw(rule: Init, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The float32 CPU tensor that parameter `name` starts from."""
    if rule.kind == "zeros":
        return torch.zeros(shape)
    if rule.kind == "ones":
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # 63 bits, because torch takes signed 64-bit seeds only.
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, rule.std, generator=generator)


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves buffers to `device` and lets the model fill them; raises ConfigError if it cannot."""
    reset = getattr(model, "reset_buffers", None)
    if reset is None:
        _refuse_meta(model)
    for module in model.modules():
        for key, slot in module._buffers.items():
            if slot is not None and slot.is_meta:
                module._buffers[key] = torch.empty_like(slot, device=device)
            elif slot is not None:
                module._buffers[key] = slot.to(device)
    if reset is not None:
        reset()


def _rule_of(model: nn.Module) -> Callable[[str, Tensor], Init] | None:
    """The model's init_rule, if it has one."""
    rule = getattr(model, "init_rule", None)
    return rule if callable(rule) else None


def _stored_of(model: nn.Module) -> Callable[[str, Tensor], Tensor] | None:
    """What reads the weights of a pretrained model on the meta device, if it can be read so."""
    stored = getattr(model, "stored_value", None)
    return stored if callable(stored) else None


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module | None:
    """The model without values; None if its constructor needs real ones (calls item(), say)."""
    try:
        with meta_device():
            return make()
    except ConfigError:
        raise
    except Exception:  # a user's constructor may raise anything; if it matters it comes again
        return None


def _refuse_meta(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise ConfigError(
            f"{type(model).__name__} was built without values and does not say how {empty[0]!r} "
            f"starts ({len(empty)} such tensors); give it init_rule(name, parameter), and "
            "reset_buffers() for buffers, or build it by smolrun.models.initialise.build_model"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All generators a constructor may use start from `seed` here, and are as before afterwards."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
