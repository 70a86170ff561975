"""Checks on the driver before any rank starts (own code, devices, memory, emulated hosts), and the
lines about them."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from smolrun.checkpoints.find import read_manifest
from smolrun.config import RunConfig, has_dedicated_server, ranks, world_size
from smolrun.config.base import CustomTargetConfig
from smolrun.config.cluster import HostConfig
from smolrun.config.plan import THIS_MACHINE
from smolrun.config.suggest import absent, closest, problem
from smolrun.driver.fleet import secrets_in_env
from smolrun.errors import ConfigError, SmolrunError
from smolrun.files import read_json
from smolrun.launch.machine_memory import machine_memory
from smolrun.targets import load_target

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared
    from smolrun.models.base import ModelSpec

_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_before_start(config: RunConfig) -> None:
    """ConfigError with every problem that would only show once the ranks run."""
    # A dry run may be about machines that are elsewhere.
    found = [*_own_code(config), *secrets_in_env(config)]
    found += [] if config.training.dry_run else _devices(config)
    if found:
        raise ConfigError(found)


def memory_warning(config: RunConfig, prepared: Prepared) -> str | None:
    """What the dry run says of memory, if that is not enough or hardly so; None for other runs.

    The estimate loads torch and takes seconds, so it is made only where a generous sum exceeds what
    there is. Of own code no such sum is known: it gets no warning.
    """
    needed, here = _generous_bytes(config, prepared), machine_memory().room
    memory_gb = config.cluster.memory_gb
    hosts = config.cluster.hosts or [
        HostConfig(name=THIS_MACHINE, ranks=world_size(config), memory_gb=memory_gb)
    ]
    for host in hosts:
        known = host.memory_gb * 2**30 if host.memory_gb else None
        room = known or (here if host.is_here else None)
        if room is not None and host.ranks * needed > room:
            break
    else:
        return None
    from smolrun.estimate import dry_run, dry_run_text

    try:
        made = dry_run.estimate(config, prepared, measure_process=False)
        fits, text = dry_run_text.memory_verdict(made)
    except SmolrunError:
        raise
    except Exception as error:  # building a model can fail in any way; the ranks say how it does
        return f"how much memory it needs is unknown ({type(error).__name__}: {error})"
    is_enough = fits and "narrowly" not in text
    return None if is_enough else f"{text}; training.dry_run=true says what would make it fit"


def _generous_bytes(config: RunConfig, prepared: Prepared) -> float:
    """More than a rank needs, from the sizes that a configuration or a config.json gives; 0 for
    unknown models."""
    sizes, vocabulary = config.model.model_dump(), prepared.num_outputs
    if prepared.model_folder is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            sizes = dict(read_json(Path(prepared.model_folder) / "config.json"))

    def first(*names: str) -> int:
        return next((sizes[name] for name in names if sizes.get(name)), 0)

    layers = first("layers", "num_hidden_layers", "n_layer")
    width = first("width", "hidden_size", "n_embd")
    hidden = first("ffn_width", "intermediate_size")
    for size in (layers, width, hidden or 1):  # a config.json may hold anything
        if type(size) is not int or not 1 <= size <= 2**31:
            return 0.0
    hidden = hidden or 4 * width
    parameters = layers * width * (4 * width + 3 * hidden) + 2 * vocabulary * width
    micro, share = config.training.micro_batch_size, config.training.global_batch_size
    share = 2 * math.ceil(share / world_size(config))  # faster ranks take more
    tokens = (share if micro == "auto" else micro) * (prepared.sequence_length or 1)
    # Float64, AdamW, a late gradient and a checkpoint; numbers kept by a block, and the logits.
    return 0.5e9 + 48 * parameters + 8 * tokens * (32 * layers * width + 4 * vocabulary)


def check_model_fits(config: RunConfig, kind: str) -> None:
    """ConfigError if the model cannot read what the data turned out to be."""
    if config.model.consumes not in (None, kind):
        what = f"reads {config.model.consumes}, but data={config.data.name} gives {kind}"
        fitting = "model=mlp" if kind == "features" else "a model such as model=gpt_tiny"
        raise ConfigError(problem("model", config.model.name, what, allowed=fitting))


def check_weights(config: RunConfig, prepared: ModelSpec, checkpoint: Path) -> None:
    """ConfigError if the model that begins with the weights of `checkpoint` has other tensors."""
    from smolrun.estimate.stages import model_maker  # loads torch
    from smolrun.estimate.trace import CannotTrace, build_on_meta
    from smolrun.parts.replicas import model_tensors

    try:
        model = build_on_meta(model_maker(config, prepared))
    except CannotTrace:  # the ranks will compare
        return
    built = {f"model/{name}": tuple(tensor.shape) for name, tensor in model_tensors(model)}
    entries = read_manifest(checkpoint).tensors.items()
    saved = {key: tuple(entry.shape) for key, entry in entries if key.startswith("model/")}
    for key in [*built, *saved]:
        if built.get(key) != saved.get(key):
            name, run = key.removeprefix("model/"), config.checkpoint.weights
            here, there = (of.get(key, "missing") for of in (built, saved))
            what = f"its weights do not fit this model: {name} is {there} there, {here} here"
            raise ConfigError(problem("model.run", run, what))


def stages_note(config: RunConfig, prepared: ModelSpec) -> str | None:
    """Which rank has which layers, where ranks hold stages of the model. ConfigError where it
    cannot be cut so."""
    if config.algorithm.stages(world_size(config)) is None:
        return None
    from smolrun.estimate.stages import cut_line  # loads torch

    try:
        return cut_line(config, prepared)
    except SmolrunError:
        raise
    except Exception:  # building a model can fail in any way; the ranks say how it does
        return None


def _own_code(config: RunConfig) -> Iterator[str]:
    groups = {"model": config.model, "data": config.data, "algorithm": config.algorithm}
    for group, section in groups.items():
        if isinstance(section, CustomTargetConfig):
            try:
                make = load_target(section.target)
            except ConfigError as error:
                yield f"{group}.target = {error}"
            else:
                yield from misfits(group, section.target, make, section.keywords())

    if (loss := config.model.loss) is not None:
        try:
            yield from _unlike_a_loss(loss, load_target(loss))
        except ConfigError as error:
            yield f"model.loss = {error}"


def _unlike_a_loss(name: str, loss: Any) -> Iterator[str]:
    if not callable(loss):
        yield problem("model.loss", name, "neither a function nor a class")
        return
    with contextlib.suppress(ValueError):  # written in C, without a signature
        try:
            inspect.signature(loss).bind(object(), object())
        except TypeError as error:
            yield problem("model.loss", name, f"cannot be called as loss(logits, targets): {error}")


def misfits(group: str, target: str, make: Any, keys: Mapping[str, Any]) -> Iterator[str]:
    """Problems of calling `make` with one positional argument and the keys of its yaml."""
    if not callable(make):
        yield problem(f"{group}.target", target, "neither a function nor a class")
        return
    try:
        signature = inspect.signature(make)
    except ValueError:  # written in C, without a signature
        return
    # smolrun gives the first parameter.
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
    elsewhere = {host.name for host in config.cluster.hosts or [] if not host.is_here}
    wanted = {rank.device for rank in ranks(config) if rank.host not in elsewhere}
    wanted &= {"cuda", "mps"}
    if not wanted:
        return
    import torch  # seconds

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    usable = ["auto", "cpu", *(name for name, is_there in there.items() if is_there)]
    for device in sorted(wanted):
        if not there[device]:
            what = "torch finds no such device on this machine"
            yield problem("cluster.device", device, what, allowed=" or ".join(usable))


def template_note(config: RunConfig) -> str | None:
    """What to say of a cluster file that came with smolrun and still has its examples as hosts."""
    name, hosts = config.cluster.name, config.cluster.hosts or []
    file = files("smolrun.conf").joinpath("cluster", f"{name}.yaml")
    if not any(host.ssh for host in hosts) or not file.is_file():
        return None
    shipped = msgspec.yaml.decode(file.read_bytes())["hosts"] or []
    examples = {(host["name"], host.get("ssh"), str(host.get("address"))) for host in shipped}
    if {(host.name, host.ssh, str(host.address)) for host in hosts} != examples:
        return None
    names = ", ".join(host.name for host in hosts)
    return (
        f"note: cluster={name} is a template: {names} are examples that came with smolrun; "
        f"`smolrun task=init` asks for your machines, or copy {name}.yaml to conf/cluster/ and "
        "change it"
    )


def start_notes(config: RunConfig) -> Iterator[str]:
    """Lines for the start of a run: a rank that does not train, a sample before, emulated hosts."""
    if has_dedicated_server(config):
        host = ranks(config)[0].host
        yield f"rank 0 on {host} is the parameter server (algorithm.server_trains=false)"
    if config.training.sample_before:
        yield "before the first step the model writes a sample (training.sample_before)"
    if not (hosts := emulated(config)):
        return
    yield f"emulated: {'; '.join(hosts)}"
    here = [host for host in config.cluster.hosts or [] if host.is_here]
    needed = sum(host.emulate.compute if host.emulate else host.ranks for host in here)
    cores = os.cpu_count() or 1
    if needed > cores:
        yield (
            f"warning: the emulated hosts need {needed:g} cores, this machine has {cores}; a "
            "smaller `emulate.compute` for all of them would keep their ratios right"
        )


def emulated(config: RunConfig) -> list[str]:
    """A sentence for each host that emulates a slower machine (`emulate:` in the cluster file)."""
    return [
        f"{host.name} emulates {', '.join(_emulation(host.emulate.model_dump()))}"
        for host in config.cluster.hosts or []
        if host.emulate is not None
    ]


def refuse_emulated(config: RunConfig, why: str) -> None:
    """ConfigError where a host of the cluster emulates a slower machine."""
    if hosts := emulated(config):
        raise ConfigError(f"cluster={config.cluster.name}: {why} ({'; '.join(hosts)})")


def _emulation(emulate: Mapping[str, Any]) -> Iterator[str]:
    yield f"{emulate['compute']:g}x speed"
    if emulate["bandwidth_mbps"] is not None:
        yield f"{emulate['bandwidth_mbps']:g} Mbit/s"
    if emulate["latency_ms"]:
        yield f"{emulate['latency_ms']:g} ms latency"
    if emulate["straggler_chance"]:
        factor, chance = emulate["straggler_factor"], emulate["straggler_chance"]
        yield f"{factor:g}x as long on {chance:.0%} of steps"
