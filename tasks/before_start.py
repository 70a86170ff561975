"""What is looked at on the driver before any rank starts: your own code, and the devices."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from smolrun.config import RunConfig, ranks
from smolrun.config.suggest import absent, closest, problem
from smolrun.config.targets import CustomTarget
from smolrun.errors import ConfigError
from smolrun.tasks.fleet import secrets_in_env
from smolrun.tasks.workers import load_target

_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_before_start(config: RunConfig) -> None:
    """ConfigError with every problem that would only show once the ranks run."""
    # A dry run may be about machines that are elsewhere.
    found = [*_own_code(config), *secrets_in_env(config)]
    found += [] if config.training.dry_run else _devices(config)
    if found:
        raise ConfigError(found)


def check_model_fits(config: RunConfig, kind: str) -> None:
    """ConfigError if the model cannot read what the data turned out to be."""
    if config.model.consumes not in (None, kind):
        what = f"reads {config.model.consumes}, but data={config.data.name} gives {kind}"
        fitting = "model=mlp" if kind == "features" else "a model such as model=gpt_tiny"
        raise ConfigError(problem("model", config.model.name, what, allowed=fitting))


def _own_code(config: RunConfig) -> Iterator[str]:
    groups = {"model": config.model, "data": config.data, "algorithm": config.algorithm}
    for group, section in groups.items():
        if isinstance(section, CustomTarget):
            try:
                make = load_target(section.target)
            except ConfigError as error:
                yield f"{group}.target = {error}"
            else:
                yield from misfits(group, section.target, make, section.keywords())


def misfits(group: str, target: str, make: Any, keys: Mapping[str, Any]) -> Iterator[str]:
    """Problems of calling `make` with one argument of the house and the keys of its yaml."""
    if not callable(make):
        yield problem(f"{group}.target", target, "neither a function nor a class")
        return
    try:
        signature = inspect.signature(make)
    except ValueError:  # written in C, and silent about what it takes
        return
    # The first parameter is the house's to give.
    parameters = list(signature.parameters.values())
    takes = [item for item in parameters[1:] if item.kind in _NAMED]
    names = [item.name for item in takes]
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters)
    wrong = [key for key in keys if key not in names and not takes_any]
    lacking = [item.name for item in takes if item.default is item.empty and item.name not in keys]
    for key in wrong:
        meant = closest(key, names)
        yield problem(
            f"{group}.{key}",
            keys[key],
            f"{target} takes no such key",
            allowed=", ".join(names) or "no keys at all",
            meant=f"{group}.{meant}" if meant else None,
        )
    for name in lacking:
        yield absent(f"{group}.{name}", f"must be given, {target} needs it")
    if not wrong and not lacking:
        try:
            signature.bind(object(), **keys)
        except TypeError as error:
            yield problem(f"{group}.target", target, f"cannot be called with its keys: {error}")


def _devices(config: RunConfig) -> Iterator[str]:
    elsewhere = {host.name for host in config.cluster.hosts or [] if host.ssh is not None}
    wanted = {rank.device for rank in ranks(config) if rank.host not in elsewhere}
    wanted &= {"cuda", "mps"}
    if not wanted:
        return
    import torch  # only where it is needed to know

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    usable = ["auto", "cpu", *(name for name, is_there in there.items() if is_there)]
    for device in sorted(wanted):
        if not there[device]:
            what = "torch finds no such device on this machine"
            yield problem("cluster.device", device, what, allowed=" or ".join(usable))
