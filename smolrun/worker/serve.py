"""What each rank of task=serve does: it measures a layer, loads its part of the model, and then is
one stage of the pipeline, of which rank 0 runs the engine. Replicas: replica.py. Only wiring."""

from __future__ import annotations

import math
import queue
import time
from typing import Any

import msgspec
import torch

from smolrun.errors import GenerationEnded, PeerLost, SmolrunError, StopRequested
from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import MAX_TASK_BYTES, StartMessage, TaskMessage, decode_data
from smolrun.launch.machine_memory import machine_memory
from smolrun.mesh.mesh import Mesh
from smolrun.parts.step_clock import Pace
from smolrun.serving.engine import Engine, Send
from smolrun.serving.json_grammar import Grammars, is_installed
from smolrun.serving.messages import (
    LOADING,
    TOPIC,
    VOCABULARY,
    Cancel,
    Load,
    Loaded,
    Loading,
    Probe,
    Probed,
    Recovering,
    StageStats,
    Submit,
    ToEngine,
    ToRank,
    Vocabulary,
)
from smolrun.serving.pipeline import PipelineHead, run_stage
from smolrun.serving.scheduler import Scheduler
from smolrun.serving.source import ModelSource, load_stage
from smolrun.serving.stage import Stage
from smolrun.serving.stage_runner import DecoderRunner, StageTimes, layer_seconds
from smolrun.serving.weight_types import serving_bytes
from smolrun.serving.weights import COMPUTE_DTYPES
from smolrun.worker.memory_limit import limit_memory
from smolrun.worker.process import regroup
from smolrun.worker.serving_host import host_watched
from smolrun.worker.train import late, pace_of, pick_device

_PROGRESS_EVERY_S = 0.2
_LOOK_S = 0.2  # how late a rank that waits for the driver sees that its mesh has failed


def serve(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """From the measurement to the end of the server; returns the rank's summary. Where ranks are
    lost or come back, the rank keeps its process and the weights that it needs again. Raises
    PeerLost where that ends the run, and StopRequested if the driver stops it before it serves."""
    with host_watched(start, channel, pick_device(start.device)):
        server = _Server(start, channel)
        while True:
            try:
                server.run(mesh)
                break
            except (PeerLost, GenerationEnded) as error:
                if start.links != "group":
                    raise
                server.pause(error)
                mesh = regroup(start, mesh, channel)
        if mesh.generation > 0:
            mesh.close()
    return {"was_stopped": True}


class _Server:
    """This rank over all generations of the mesh."""

    def __init__(self, start: StartMessage, channel: WorkerChannel) -> None:
        self._start, self._channel = start, channel
        self._rank = start.rank
        self._device = torch.device(pick_device(start.device))
        self._pace = pace_of(start.config, start.rank)
        self._limit = limit_memory(start, self._device.type, channel.emit)
        self._inbox: queue.SimpleQueue[ToRank | None] = queue.SimpleQueue()
        self._vocabulary = vocabulary_from(channel)
        self._stage: Stage | None = None
        self._engine: Engine | None = None

        def take(message: TaskMessage) -> None:
            self._inbox.put(decode_data(message, ToRank))  # type: ignore[arg-type]  # a union

        channel.subscribe(LOADING, take)
        channel.on_stop(lambda: self._inbox.put(None))

    def run(self, mesh: Mesh) -> None:
        """One generation: load, then serve until the driver stops the run. Raises PeerLost and
        GenerationEnded."""
        load = self._wait_load(mesh)
        source = msgspec.convert(load.source, ModelSource)
        source = msgspec.structs.replace(source, folder=load.folders[self._rank])
        runner, times = self._prepare(load, source)
        if self._rank == load.head:
            self._run_engine(load, source, runner, times, mesh)
        elif runner is not None:
            run_stage(mesh, load.stages, runner, times)
        else:
            self._idle(mesh)
        if too_slow := late(self._pace, self._rank):
            self._channel.emit(too_slow)

    def pause(self, error: SmolrunError) -> None:
        """Tell the clients why their answers pause."""
        if self._engine is not None:
            self._channel.send_data(TOPIC, Recovering(str(error)[:1000]))

    def _wait_load(self, mesh: Mesh) -> Load:
        """Answer every Probe until there is a Load of this generation; blocks."""
        while True:
            message = self._next(mesh)
            if message is None:
                raise StopRequested("the driver asked this rank to stop before it began")
            if isinstance(message, Probe):
                probed = measure(message, self._rank, self._device, self._pace, self._limit)
                self._channel.send_data(LOADING, probed)
            elif message.generation == mesh.generation:
                return message

    def _next(self, mesh: Mesh) -> ToRank | None:
        """The driver's next message, None once it stops the run; raises why the mesh failed."""
        while True:
            if mesh.failure is not None:
                raise mesh.failure
            try:
                return self._inbox.get(timeout=_LOOK_S)
            except queue.Empty:
                pass

    def _idle(self, mesh: Mesh) -> None:
        """A rank without layers, until the end of the run or of the generation."""
        while self._next(mesh) is not None:
            pass

    def _prepare(self, load: Load, source: ModelSource) -> tuple[DecoderRunner | None, StageTimes]:
        """This rank's stage, if it has layers, and its figures."""
        if self._rank not in load.stages:
            self._stage = None
            self._channel.send_data(LOADING, Loaded(self._rank, 0, 0))
            return None, StageTimes(StageStats(self._rank, self._start.host, 0, -1))
        kept = self._stage
        if kept is not None:
            kept.shrink(_layers_of(load, self._rank))
        stage = load_part(load, source, self._rank, self._channel, self._device, kept)
        self._stage = stage
        grammars = grammars_of(self._vocabulary, source) if self._rank == load.stages[-1] else None
        return runner_of(load, stage, self._rank, self._start.host, self._pace, grammars)

    def _run_engine(
        self,
        load: Load,
        source: ModelSource,
        runner: DecoderRunner | None,
        times: StageTimes,
        mesh: Mesh,
    ) -> None:
        """Requests from the driver, tokens to it; blocks until the driver stops the run."""
        scheduler = scheduler_for(load, source)
        engine = self._engine
        if engine is None:
            engine = self._engine = self._new_engine(scheduler, load.version)
        else:
            engine.recover(scheduler)
        # A stage that is alone receives nothing by which it would see the end of its generation.
        end = mesh.submit("the end of the generation", lambda work: None)
        end.add_done_callback(lambda work: engine.on_result(work.error))
        engine.run(PipelineHead(mesh, load.stages, runner, times, engine.on_result))

    def _new_engine(self, scheduler: Scheduler, version: int) -> Engine:
        channel = self._channel
        engine = engine_for(scheduler, lambda message: channel.send_data(TOPIC, message), version)

        def take(message: TaskMessage) -> None:
            request: ToEngine = decode_data(message, ToEngine)  # type: ignore[arg-type]  # a union
            if isinstance(request, Submit | Cancel):  # others are for replicas
                engine.submit(request)

        channel.subscribe(TOPIC, take)
        channel.on_stop(engine.stop)
        return engine


def vocabulary_from(channel: WorkerChannel) -> list[bytes]:
    """The bytes of all tokens, which the driver sends; empty until they have come."""
    known: list[bytes] = []

    def keep(message: TaskMessage) -> None:
        part = decode_data(message, Vocabulary)
        known[part.first :] = part.token_bytes

    channel.subscribe(VOCABULARY, keep)
    return known


def grammars_of(vocabulary: list[bytes], source: ModelSource) -> Grammars | None:
    """For a rank that samples, where the driver and this host have the library."""
    if not vocabulary or not source.end_ids or not is_installed():
        return None
    return Grammars(vocabulary, source.vocab_size, source.end_ids)


def scheduler_for(load: Load, source: ModelSource) -> Scheduler:
    """For the stages of a Load."""
    return Scheduler(
        slots=load.slots,
        capacity=load.capacity,
        vocab_size=source.vocab_size,
        stages=len(load.stages),
        chunk_tokens=load.chunk_tokens,
        prefix_reuse=load.prefix_reuse,
    )


def engine_for(scheduler: Scheduler, send: Send, version: int) -> Engine:
    """An engine whose messages fit into one to the driver."""
    limit = MAX_TASK_BYTES - 1024  # the message around the data needs a few bytes too
    return Engine(scheduler, send, max_message_bytes=limit, version=version)


def runner_of(
    load: Load, stage: Stage, rank: int, host: str, pace: Pace, grammars: Grammars | None
) -> tuple[DecoderRunner, StageTimes]:
    """What runs a stage, and counts."""
    sizes, layers = (stage.weight_bytes, stage.cache_bytes), stage.layers
    figures = StageStats(rank, host, layers.start, layers.stop - 1, *sizes)
    chunk = max(load.chunk_tokens, load.slots) + load.slots
    return DecoderRunner(stage, chunk, grammars), StageTimes(figures, pace)


def measure(probe: Probe, rank: int, device: torch.device, pace: Pace, limit: float) -> Probed:
    """The time of one layer for one token. The head is a matrix like those of a layer, which take
    their time per weight."""
    source = msgspec.convert(probe.source, ModelSource)
    sizes = serving_bytes(source.shape, source.vocab_size, probe.dtype, source.group_size)
    free_bytes = int(min(machine_memory().available, limit))
    layer_s = layer_seconds(source.shape, probe.dtype, source.group_size, device, pace)
    return Probed(rank, layer_s, layer_s * sizes.head / sizes.layer, free_bytes)


def load_part(
    load: Load,
    source: ModelSource,
    rank: int,
    channel: WorkerChannel,
    device: torch.device,
    kept: Stage | None,
) -> Stage:
    """This rank's stage, with its weights; those of its earlier stage are not loaded again."""
    layers = _layers_of(load, rank)
    first, last = layers.start, layers.stop - 1
    ends = (rank == load.stages[0], rank == load.stages[-1])
    reported_s = -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal reported_s
        now = time.monotonic()
        if done == total or now - reported_s >= _PROGRESS_EVERY_S:
            channel.send_data(LOADING, Loading(rank, done, total))
            reported_s = now

    held = kept.parameter_names() if kept is not None else ()
    parameters = load_stage(source, first, last, *ends, load.dtype, progress, held)
    for name in parameters:
        parameters[name] = parameters[name].to(device)
    stage = Stage(
        source.shape,
        source.vocab_size,
        first,
        last,
        *ends,
        parameters,
        slots=load.slots,
        capacity=load.capacity,
        dtype=COMPUTE_DTYPES[load.dtype],
        batch_invariant=load.batch_invariant,
        kept=kept,
    )
    channel.send_data(LOADING, Loaded(rank, stage.weight_bytes, stage.cache_bytes))
    return stage


def _layers_of(load: Load, rank: int) -> range:
    """The layers of a rank that is a stage."""
    index = load.stages.index(rank)
    first = load.last_layers[index - 1] + 1 if index else 0
    return range(first, load.last_layers[index] + 1)
