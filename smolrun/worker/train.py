"""What one rank does in task=train: build model, data, algorithm and trainer from the resolved
config, and train.

Only wiring; the driver's half is tasks/train.py.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from smolrun.algorithms.base import Algorithm, Context
from smolrun.algorithms.contract import LossSum, loss_sum, own_loss_sum
from smolrun.checkpoints.find import checkpoints_in
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.writer import Saver, partition_keys
from smolrun.data.order import SampleOrder
from smolrun.data.splits import Batch, Prepared, Split, open_split
from smolrun.errors import CheckpointError, ConfigError
from smolrun.events import Event, Note, RunStarted
from smolrun.launch.control import Saving
from smolrun.mesh.mesh import Mesh
from smolrun.models.initialise import build_model, build_shell, check_trainable, first_value
from smolrun.models.trained import SIZES
from smolrun.parts.norms import LayerNorms
from smolrun.parts.placement import (
    BatchPlans,
    DataCoordinates,
    known_speeds,
    memory_limits,
    memory_shares,
    plan_batches,
    rank_speeds,
    ranked_hosts,
    shares,
)
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.quantization import Quantization
from smolrun.parts.step_clock import FULL_SPEED, EmulatedPace, Pace
from smolrun.targets import keywords, load_target, model_keywords
from smolrun.training.evaluation import Evaluation, TextSampling
from smolrun.training.load_balancer import BalancePolicy, LoadBalancer
from smolrun.training.loader import (
    BatchLoader,
    PlanSource,
    RowClient,
    StreamLoader,
    prefetched_steps,
    sequential_batches,
)
from smolrun.training.optimizer import ELEMENTWISE, lr_schedule, make_optimizer
from smolrun.training.replica_sync import ReplicaCheck, ReplicaSync
from smolrun.training.step_metrics import StepMetrics, TerminateOnNonfinite, peak_memory
from smolrun.training.timeline import TimelineRecorder
from smolrun.training.trainer import Callback, Periodic, Trainer, TrainOutcome

_LATE = 0.05  # from here on the times of an emulated rank are not those of the emulated machine


def train(
    config: dict[str, Any],
    prepared: Prepared,
    mesh: Mesh,
    *,
    device: str,
    speeds: Sequence[float | str],
    emit: Callable[[Event], None],
    should_stop: Callable[[], bool],
    saving: Saving | None = None,
    rows: RowClient | None = None,
) -> dict[str, Any]:
    """Trains as the resolved `config` says; returns this rank's summary. `speeds` has one number
    or "auto" per rank; without `saving` nothing is saved; `rows` is where a stream comes from."""
    training = config["training"]
    seed_everything(torch.device(device), config["seed"])
    eval_split = open_split(prepared, "eval", verify=True)
    algorithm = place_algorithm(config, prepared, mesh, torch.device(device))
    plan, balancer = share_work(config, prepared, speeds, algorithm.data_coordinates, emit)
    steps = training["steps"]
    eval_batches = functools.partial(_eval_batches, algorithm, eval_split, plan, training)
    data = data_state(prepared)
    checkpoints = RankCheckpoints(saving, algorithm, emit, steps, data) if saving else None
    callbacks = _callbacks(config, prepared, algorithm, emit, eval_batches, balancer, checkpoints)
    trainer = Trainer(
        algorithm,
        _samples(config, prepared, plan, rows),
        steps=steps,
        callbacks=callbacks,
        should_stop=should_stop,
        drain_on_stop=not (saving and saving.every),
    )
    if checkpoints:
        checkpoints.begin(trainer)
    if algorithm.can_evaluate and not algorithm.is_lockstep:
        algorithm.try_out(eval_split.batch(range(min(2, len(eval_split)))))
    emit(_started(algorithm, prepared, steps))
    if algorithm.note and mesh.rank == 0:
        emit(Note("info", algorithm.note))
    outcome = trainer.fit()
    if too_slow := late(algorithm.context.pace, mesh.rank):
        emit(too_slow)
    algorithm.finish()
    if checkpoints:
        checkpoints.finish()  # last, as no other rank has to wait for this disk
    return {**dataclasses.asdict(outcome), "peak_memory_bytes": peak_memory()}


def _callbacks(
    config: dict[str, Any],
    prepared: Prepared,
    algorithm: Algorithm,
    emit: Callable[[Event], None],
    eval_batches: Callable[[], Iterable[list[Batch]]],
    balancer: LoadBalancer | None,
    checkpoints: RankCheckpoints | None,
) -> list[Callback]:
    """What runs beside training, in the order in which it runs after an update."""
    training, tracker = config["training"], config["tracker"]
    is_lockstep = algorithm.is_lockstep
    metrics = StepMetrics(algorithm, emit)
    callbacks: list[Callback] = [metrics]
    # Ranks that do not begin every step together have no common zero of time.
    if is_lockstep and tracker["timeline_steps"]:
        spans = TimelineRecorder(algorithm, tracker["timeline_steps"], training["steps"], emit)
        callbacks.append(spans)
    callbacks.append(TerminateOnNonfinite(algorithm, emit))
    callbacks.append(ReplicaSync(algorithm, training["resync_every"], emit))
    if is_lockstep and balancer:
        callbacks.append(balancer)
    if training["check_replicas"]:
        callbacks.append(ReplicaCheck(algorithm, emit))
    if algorithm.can_evaluate:
        evaluation = Evaluation(algorithm, eval_batches, training["eval_every"], emit)
        evaluation.on_done = metrics.restart_interval
        callbacks.append(evaluation)
    if checkpoints:
        callbacks.append(checkpoints)
    if prepared.tokenizer and training["sample_tokens"] and algorithm.can_evaluate:
        callbacks.append(
            TextSampling(
                algorithm=algorithm,
                prepared=prepared,
                prompt=training["sample_prompt"],
                num_tokens=training["sample_tokens"],
                compares=training["sample_before"],
                seed=config["seed"],
                emit=emit,
            )
        )
    return callbacks


def _eval_batches(
    algorithm: Algorithm, split: Split, plan: PlanSource, training: dict[str, Any]
) -> Iterator[list[Batch]]:
    now = plan.at(algorithm.steps_begun)
    if algorithm.evaluates_locally:
        now = now.alone(algorithm.context.mesh.world_size)
    return sequential_batches(split, now, training["eval_batches"])


def _started(algorithm: Algorithm, prepared: Prepared, steps: int) -> RunStarted:
    return RunStarted(
        parameters=sum(parameter.numel() for parameter in algorithm.whole_parameters()),
        steps=steps,
        train_size=prepared.train_size,
        eval_size=prepared.eval_size,
        device=algorithm.context.device.type,
    )


def _samples(
    config: dict[str, Any], prepared: Prepared, plan: PlanSource, rows: RowClient | None
) -> BatchLoader | StreamLoader:
    """This rank's samples: of a file, in the order of the seed, or of the stream as it comes."""
    if prepared.stream is not None:
        assert rows is not None, "the driver of a stream has its rows"
        return StreamLoader(
            rows=rows,
            plan=plan,
            sequence_length=prepared.sequence_length or 1,
            steps=config["training"]["steps"],
            prefetch_steps=prepared.stream["prefetch_steps"],
            timeout_s=float(config["mesh"]["timeout_s"]),
        )
    split = open_split(prepared, "train", verify=False)
    return BatchLoader(split, SampleOrder(len(split), config["seed"]), plan)


def pick_device(device: str) -> str:
    """The device that a rank computes on; "auto" takes an accelerator where there is one."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def place_algorithm(
    config: dict[str, Any], prepared: Prepared, mesh: Mesh, device: torch.device
) -> Algorithm:
    """The algorithm of the resolved `config`, with its model placed; collective."""
    training = config["training"]
    bound = config["staleness"]["bound"]
    speeds = rank_speeds(config.get("cluster"), mesh.world_size)
    context = Context(
        mesh=mesh,
        device=device,
        precision=PRECISIONS[config["precision"]],
        make_optimizer=optimizer_maker(config),
        learning_rate=lr_schedule(
            training["lr_schedule"],
            peak=config["optimizer"]["lr"],
            steps=training["steps"],
            warmup_steps=training["warmup_steps"],
            min_ratio=training["min_lr_ratio"],
        ),
        staleness=0 if bound == "auto" else bound,
        staleness_bound=None if bound == "auto" else bound,
        quantization=Quantization(**config["quantization"]),
        grad_clip=training["grad_clip"],
        num_outputs=prepared.num_outputs,
        expected_weight=training["global_batch_size"] * (prepared.sequence_length or 1),
        norms=LayerNorms(training["log_norms"], training["log_norms_every"]),
        is_elementwise=config["optimizer"]["name"] in ELEMENTWISE,
        shard_weights=memory_shares(config.get("cluster", {}).get("hosts")),
        speeds=None if "auto" in speeds else tuple(known_speeds(speeds)),
        memory_bytes=memory_limits(config.get("cluster", {}).get("hosts")),
        first_value=functools.partial(first_value, seed=config["seed"]),
        pace=pace_of(config, mesh.rank),
        reseed=functools.partial(seed_everything, device, config["seed"]),
        loss_sum=loss_of(config["model"]),
    )
    make = load_target(config["algorithm"]["target"])
    algorithm: Algorithm = make(context, **keywords(config["algorithm"]))
    is_whole = algorithm.needs_full_model
    algorithm.place(new_model(config, prepared, device, has_values=is_whole))
    return algorithm


def loss_of(model: Mapping[str, Any]) -> LossSum:
    """The loss that a model is trained with: cross entropy, or the user's own (`model.loss`)."""
    name = model.get("loss")
    return loss_sum if name is None else own_loss_sum(load_target(name), name)


def optimizer_maker(config: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    """make(named_parameters) -> the optimizer of the config."""
    return functools.partial(make_optimizer, seed=config["seed"], **config["optimizer"])


def new_model(
    config: dict[str, Any], prepared: Prepared, device: torch.device, *, has_values: bool = True
) -> torch.nn.Module:
    """The model of the config with its first values, the same on every rank; or without, where it
    can say later what they are."""
    section = config["model"]
    make = functools.partial(load_target(section["target"]), prepared, **model_keywords(section))
    dtype = PRECISIONS[config["precision"]].parameters
    build = build_model if has_values else build_shell
    model = build(make, config["seed"], dtype=dtype, device=device)
    check_trainable(model)
    if config["training"]["recompute"]:
        if not hasattr(model, "recompute"):
            raise ConfigError(f"model.name = {section['name']} cannot recompute its blocks")
        setattr(model, "recompute", True)  # noqa: B010  (nn.Module's own type has no such name)
    return model


def seed_everything(device: torch.device, *words: int) -> None:
    """Seeds the generators of Python, numpy, torch and `device` from integers >= 0.

    A run seeds them before every micro-batch with its seed and the position of the first sample, so
    dropout and augmentation draw differently on every rank, alike for any world size with equal
    micro-batches, and a resumed run needs no generator state. algorithms/base.py says which
    integers are used when.

    Source: counter-based generators, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
    2011.
    """
    sequence = numpy.random.SeedSequence(words)
    first, second, third = (int(word) for word in sequence.generate_state(3))
    random.seed(first)
    numpy.random.seed(second)
    # Not torch.manual_seed: where an accelerator is not in use yet, it formats a traceback for
    # each kind of them, 0.1 ms a call.
    torch.default_generator.manual_seed(third)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(third)
    elif device.type == "mps":
        torch.mps.manual_seed(third)


def pace_of(config: Mapping[str, Any], rank: int) -> Pace:
    """How fast a rank of the resolved configuration computes: emulated, or at full speed."""
    hosts = ranked_hosts(config.get("cluster"))
    emulate = hosts[rank]["emulate"] if hosts else None
    if not emulate or (emulate["compute"] == 1 and not emulate["straggler_chance"]):
        return FULL_SPEED
    return EmulatedPace(
        emulate["compute"],
        straggler_chance=emulate["straggler_chance"],
        straggler_factor=emulate["straggler_factor"],
        seed=f"{config['seed']} {rank}",
    )


def late(pace: Pace, rank: int) -> Note | None:
    """A warning where a rank could not keep its pace."""
    if pace.late < _LATE:
        return None
    return Note(
        "warning",
        f"emulation: computing took {pace.late:.0%} longer than on the emulated machine, because "
        "something else used this rank's core; its times are too long by that",
        rank,
    )


def share_work(
    config: Mapping[str, Any],
    prepared: Prepared,
    speeds: Sequence[float | str],
    coordinates_of: Callable[[Sequence[float]], DataCoordinates],
    emit: Callable[[Event], None],
) -> tuple[PlanSource, LoadBalancer | None]:
    """This rank's plan, and what changes it where a speed is "auto". `coordinates_of` says
    which part of a batch the rank reads.

    Numbers are used as they are. One "auto" is enough to have all ranks measured, because measured
    speeds and given numbers have no unit in common: then the numbers are where it begins.
    """
    training = config["training"]
    size = training["global_batch_size"]
    micro = None if training["micro_batch_size"] == "auto" else training["micro_batch_size"]
    coordinates = coordinates_of(known_speeds(speeds))
    weights, index = coordinates.weights, coordinates.index
    # Shares of pipelines do not change: ranks that share samples follow one cut of the model.
    if "auto" not in speeds or len(weights) < len(speeds):
        return plan_batches(size, weights, index, micro, coordinates.micro_batches), None
    counts = shares(size, weights)
    plans = BatchPlans(lambda now: plan_batches(size, now, index, micro), counts)
    idle = [number for number, weight in enumerate(weights) if not weight]
    ahead = 0 if prepared.stream is None else prefetched_steps(prepared.stream["prefetch_steps"])
    hosts = [host["name"] for host in ranked_hosts(config.get("cluster"))]
    return plans, LoadBalancer(
        policy=BalancePolicy(counts, idle=idle),
        plans=plans,
        steps=training["steps"],
        emit=emit,
        prefetched_steps=ahead,
        hosts=hosts,
    )


def data_state(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint says of the data: its hash, and the sizes that the model was built for."""
    sizes = {name: getattr(prepared, name) for name in SIZES}
    return {"sha256": prepared.sha256, **sizes}


class RankCheckpoints(Periodic):
    """Saves every `saving.every` updates and at the end; restores before the first step."""

    _trainer: Trainer

    def __init__(
        self,
        saving: Saving,
        algorithm: Algorithm,
        emit: Callable[[Event], None],
        steps: int,
        data: Mapping[str, Any],
    ) -> None:
        super().__init__(saving.every)
        self._steps = steps
        self._saved_at = 0  # updates
        self._saving = saving
        self._algorithm = algorithm
        self._data = data
        self._rank = algorithm.context.mesh.rank
        self._saver = Saver(Path(saving.folder), saving.token, self._rank, emit)

    def begin(self, trainer: Trainer) -> None:
        """Checks the disk's free space and resumes from the checkpoint if there is one; collective.
        CheckpointError if the run cannot begin."""
        self._trainer = trainer
        if self.every:
            self._check_space()
        self._restore()
        # What the driver does next to the run's folder must not come before all ranks are ready.
        self._algorithm.start_barrier()

    def finish(self) -> None:
        """Waits until the last save is written."""
        self._saver.finish()

    def _check_space(self) -> None:
        """CheckpointError if this host's disk has no room for what will be kept."""
        saving, folder = self._saving, Path(self._saving.folder)
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        kept = [path for _, path in checkpoints_in(folder)][: saving.keep]
        held = sum(file.stat().st_size for path in kept for file in path.iterdir())
        # One more than are kept, as a new one is whole before an old one goes.
        needed = self._algorithm.checkpoint_bytes() * (saving.keep + saving.keep_best + 1) - held
        if needed > free:
            raise CheckpointError(
                f"checkpoints need {needed / 1e9:.1f} GB more in {folder}, the disk has "
                f"{free / 1e9:.1f} GB free; `smolrun task=clean` deletes old runs, or set "
                "checkpoint.keep=1, or checkpoint=none"
            )

    def run(self, step: int, due: int) -> None:
        """Saves under the number `due`, which is the same on all ranks."""
        if step + 1 < self._steps:  # the last one is saved after the final evaluation
            self._saved_at = step + 1
            self._save(due)

    def after_training(self, outcome: TrainOutcome) -> None:
        """Saves, unless it did after the last update."""
        if self.every and self._saved_at != outcome.steps:
            self._save(outcome.steps)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the count of updates."""
        super().restore(state)
        self._saved_at = self._updates

    def _save(self, updates: int) -> None:
        """Starts to save the state after so many updates; on all ranks alike."""
        if not self._algorithm.has_checkpoint_state:
            return
        group = self._algorithm.replica_group
        slices = partition_keys(self._algorithm.owned(), group.size, group.index)
        state = {
            "training": self._trainer.state(),
            "algorithm": self._algorithm.state(),
            "data": self._data,
        }
        self._saver.save(updates, slices, {"run": state} if self._rank == 0 else {})

    def _restore(self) -> None:
        """Loads the checkpoint that the run resumes from, or whose weights it begins with, if there
        is one; on all ranks alike."""
        if self._saving.resume is None:
            return
        with CheckpointReader(Path(self._saving.resume)) as checkpoint:
            if self._saving.weights_only:
                self._algorithm.load_weights(checkpoint)
                return
            state = checkpoint.manifest.state
            try:
                self._algorithm.restore(checkpoint, state["algorithm"])
                self._trainer.restore(state["training"])
            except (LookupError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"the state in {checkpoint.folder} cannot be used: {error!r}"
                ) from None
