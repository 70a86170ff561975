"""Rules that join several groups. Each check is a pure function that yields problem lines.

The parameters of a check are the groups it reads: it runs when exactly these are valid by
themselves, so that one bad key does not hide the problems of all the others.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from smolrun.config.algorithm import AlgorithmConfig
from smolrun.config.base import CustomTargetConfig
from smolrun.config.cluster import ClusterConfig
from smolrun.config.cluster_checks import CLUSTER_CHECKS
from smolrun.config.data import DataConfig
from smolrun.config.models import (
    PRETRAINED_NAMES,
    CustomModelConfig,
    DecoderConfig,
    HuggingFaceConfig,
    MlpConfig,
    ModelConfig,
    TrainedConfig,
)
from smolrun.config.optimizers import Optimizer, SGDConfig
from smolrun.config.plan import cluster_size
from smolrun.config.settings import (
    Mesh,
    QuantizationConfig,
    ServingConfig,
    StalenessConfig,
    TorchMeshConfig,
    TrainingConfig,
)
from smolrun.config.suggest import absent, closest, problem

SERVING_TASKS = ("serve", "generate", "chat")


def ranks_fit_algorithm(
    *, cluster: ClusterConfig, algorithm: AlgorithmConfig, world_size: int
) -> Iterator[str]:
    """The reference runs alone."""
    if algorithm.max_ranks is not None and world_size > algorithm.max_ranks:
        key, alone = "cluster.ranks", "cluster.ranks=1"
        if cluster.hosts is not None:
            key, alone = "cluster.hosts", "cluster=local cluster.ranks=1"
        what = f"algorithm={algorithm.name} is one rank"
        yield problem(key, world_size, what, allowed=f"{alone}, or algorithm=classicdp")


def mesh_fits(*, task: str, algorithm: AlgorithmConfig, mesh: Mesh) -> Iterator[str]:
    """A process group of torch has the ranks that it began with."""
    if not isinstance(mesh, TorchMeshConfig):
        return
    if task in (*SERVING_TASKS, "doctor"):
        what = f"task={task} has links that break and are made again"
        yield problem("mesh", mesh.kind, what, allowed="mesh=tcp, or task=train, bench")
    if algorithm.is_asynchronous:
        what = f"ranks of algorithm={algorithm.name} join and leave during a run"
        yield problem("mesh", mesh.kind, what, allowed="mesh=tcp, or another algorithm")


def ranks_fit_batch(
    *, algorithm: AlgorithmConfig, training: TrainingConfig, world_size: int
) -> Iterator[str]:
    """Every rank that trains needs at least one sample of each step."""
    size, batch = world_size - algorithm.has_dedicated_server, training.global_batch_size
    if size > batch:
        yield problem(
            "training.global_batch_size",
            batch,
            f"too small for {size} ranks",
            allowed=f">= {size}, or at most {batch} ranks",
        )


def batch_is_sound(*, training: TrainingConfig) -> Iterator[str]:
    """Sizes and steps of the loop agree with each other."""
    micro, batch = training.micro_batch_size, training.global_batch_size
    if micro != "auto" and micro > batch:
        yield problem(
            "training.micro_batch_size",
            micro,
            "larger than the global batch",
            allowed=f"auto or 1 to {batch}",
        )
    if training.warmup_steps > training.steps:
        yield problem(
            "training.warmup_steps",
            training.warmup_steps,
            "longer than the run",
            allowed=f"0 to {training.steps}",
        )


def staleness_fits_steps(*, staleness: StalenessConfig, training: TrainingConfig) -> Iterator[str]:
    """The first updates of a delayed run are skipped; some must remain."""
    if staleness.bound != "auto" and staleness.bound >= training.steps:
        allowed = f"less than training.steps, which is {training.steps}"
        yield problem("staleness.bound", staleness.bound, "as long as the run", allowed=allowed)


def quantization_fits_algorithm(
    *, quantization: QuantizationConfig, algorithm: AlgorithmConfig
) -> Iterator[str]:
    """One rank sends no gradients."""
    if algorithm.max_ranks == 1 and quantization.kind != "none":
        yield problem(
            "quantization.kind",
            quantization.kind,
            f"algorithm={algorithm.name} sends nothing",
            allowed="none, or algorithm=classicdp",
        )


def there_are_replicas(*, training: TrainingConfig, algorithm: AlgorithmConfig) -> Iterator[str]:
    """A resync makes replicas equal, so there have to be some."""
    if training.resync_every not in ("auto", 0) and algorithm.why_no_replicas:
        why = algorithm.why_no_replicas
        yield problem("training.resync_every", training.resync_every, why, allowed="auto or 0")


def server_is_a_host(*, cluster: ClusterConfig, algorithm: AlgorithmConfig) -> Iterator[str]:
    """`cluster.server` is one of the hosts, and the algorithm has a server."""
    if cluster.server is None:
        return
    names = [host.name for host in cluster.hosts or []]
    if not algorithm.has_server:
        what = f"algorithm={algorithm.name} has no server"
        allowed = "null, or algorithm=edp, syncps"
        yield problem("cluster.server", cluster.server, what, allowed=allowed)
    elif cluster.server not in names:
        what = f"no host of cluster={cluster.name}"
        allowed = ", ".join(names) or "null: there are no cluster.hosts"
        meant = closest(cluster.server, names)
        yield problem("cluster.server", cluster.server, what, allowed=allowed, meant=meant)


def model_fits_data(*, model: ModelConfig, data: DataConfig) -> Iterator[str]:
    """A model reads what the data gives, and sequences are not longer than it can read."""
    if model.consumes and data.produces and model.consumes != data.produces:
        fitting = "data=python_stdlib or data=text" if model.consumes == "tokens" else "data=digits"
        other = "model=mlp" if data.produces == "features" else "a model such as model=gpt_tiny"
        what = f"reads {model.consumes}, but data={data.name} gives {data.produces}"
        yield problem("model", model.name, what, allowed=f"{fitting}, or {other}")
    length = getattr(data, "sequence_length", None)
    if (
        isinstance(model, DecoderConfig)
        and isinstance(length, int)
        and length > model.max_sequence_length
    ):
        longest = model.max_sequence_length
        yield problem(
            "data.sequence_length",
            length,
            f"model={model.name} reads at most {longest}",
            allowed=f"1 to {longest}",
        )


def model_is_named(*, model: ModelConfig) -> Iterator[str]:
    """Names of models are for model=hf only, and there they must be given."""
    if isinstance(model, HuggingFaceConfig) and model.name == "hf":
        yield absent("model.name", "set model.name=NAME of the hub, or a FOLDER")
    if isinstance(model, DecoderConfig | MlpConfig) and "/" in model.name:
        yield problem(
            "model.name",
            model.name,
            "a model of smolrun's own is not loaded by name",
            allowed=f"model=hf model.name={model.name}",
        )


def model_fits_task(*, task: str, model: ModelConfig) -> Iterator[str]:
    """An earlier run's model is trained further, served or exported."""
    if isinstance(model, TrainedConfig) and task not in ("export", *SERVING_TASKS):
        what = f"is not for task={task}"
        yield problem(
            "model", model.name, what, allowed="task=train, serve, generate, chat, export"
        )
    if task == "export" and not isinstance(model, TrainedConfig):
        what = "task=export takes its model from a run"
        yield problem("model", model.name, what, allowed="no model=..., but model.run=latest|RUN")
    if task not in SERVING_TASKS:
        return
    is_random = isinstance(model, DecoderConfig) and model.name not in PRETRAINED_NAMES
    if is_random or isinstance(model, MlpConfig | CustomModelConfig):
        yield problem(
            "model",
            model.name,
            "is built anew, so it has not learned anything to serve",
            allowed="model.run=latest|RUN of a training run, or model=hf model.name=NAME|FOLDER",
        )


def driver_fits_task(*, task: str, driver: str | None, serving: ServingConfig) -> Iterator[str]:
    """What answers in this terminal is driven by this machine."""
    if task in ("generate", "chat") and driver is not None:
        what = f"task={task} is driven by this machine"
        yield problem("driver", driver, what, allowed="null; or run the command on that host")
    if task == "serve" and serving.service and driver is not None:
        what = "a service belongs to the machine that runs it"
        allowed = f"null, in a terminal on {driver}; and driver=null"
        yield problem("driver", driver, what, allowed=allowed)


def heads_fit_width(*, model: ModelConfig) -> Iterator[str]:
    """The widths of attention divide evenly."""
    if not isinstance(model, DecoderConfig):
        return
    if model.head_width is None and model.width % model.heads:
        yield problem(
            "model.heads",
            model.heads,
            f"does not divide model.width = {model.width}",
            allowed="a divisor of it",
        )
    if model.kv_heads is not None and model.heads % model.kv_heads:
        allowed = f"a divisor of model.heads = {model.heads}"
        yield problem(
            "model.kv_heads", model.kv_heads, "does not divide the query heads", allowed=allowed
        )
    head_width = model.head_width or model.width // model.heads
    if model.position == "rope" and head_width % 2:
        yield problem(
            "model.head_width",
            head_width,
            "odd, but rotary positions turn pairs",
            allowed="an even number",
        )


def blocks_can_be_recomputed(*, model: ModelConfig, training: TrainingConfig) -> Iterator[str]:
    """Only a model of blocks can compute them twice."""
    if training.recompute and isinstance(model, MlpConfig):
        what = f"model={model.name} has no blocks to compute twice"
        yield problem("training.recompute", True, what, allowed="false")


def momentum_fits(*, optimizer: Optimizer) -> Iterator[str]:
    """Nesterov momentum needs a momentum factor."""
    if isinstance(optimizer, SGDConfig) and optimizer.nesterov and optimizer.momentum == 0:
        yield problem(
            "optimizer.nesterov", True, "needs momentum", allowed="false, or optimizer.momentum > 0"
        )


def own_code_is_there(
    *, model: ModelConfig, data: DataConfig, algorithm: AlgorithmConfig
) -> Iterator[str]:
    """Your own module is found without importing it: beside you, or installed."""
    groups = {"model": model, "data": data, "algorithm": algorithm}
    own = {
        f"{group}.target": section.target
        for group, section in groups.items()
        if isinstance(section, CustomTargetConfig)
    }
    own |= {"model.loss": model.loss} if model.loss else {}
    for key, target in own.items():
        package = target.split(":")[0].split(".")[0]
        if importlib.util.find_spec(package) is None:
            allowed = "a module in the folder you are in, or an installed one"
            yield problem(key, target, f"there is no module {package}", allowed=allowed)


def loss_fits_task(*, task: str, model: ModelConfig) -> Iterator[str]:
    """What task=bench compares with trains with cross entropy."""
    if task == "bench" and model.loss is not None:
        what = "task=bench compares with programs that train with cross entropy"
        yield problem("model.loss", model.loss, what, allowed="null")


CHECKS: tuple[Callable[..., Iterator[str]], ...] = (
    *CLUSTER_CHECKS,
    ranks_fit_algorithm,
    mesh_fits,
    ranks_fit_batch,
    batch_is_sound,
    staleness_fits_steps,
    quantization_fits_algorithm,
    there_are_replicas,
    server_is_a_host,
    model_fits_data,
    model_is_named,
    model_fits_task,
    driver_fits_task,
    heads_fit_width,
    blocks_can_be_recomputed,
    momentum_fits,
    own_code_is_there,
    loss_fits_task,
)


def problems(groups: Mapping[str, Any]) -> Iterator[str]:
    """Every problem found by the checks whose groups are all there, the algorithm's own last."""
    known, checks = dict(groups), list(CHECKS)
    if (algorithm := groups.get("algorithm")) is not None:
        names = [name for name in dir(type(algorithm)) if name.startswith("check_")]
        checks += [getattr(algorithm, name) for name in names]
        if "cluster" in groups:
            known["world_size"] = cluster_size(groups["cluster"], algorithm)
    for check in checks:
        needed = inspect.signature(check).parameters
        if all(name in known for name in needed):
            yield from check(**{name: known[name] for name in needed})
