"""What a replica does: it has the whole model, and an engine that answers requests.

    driver   -- Load 300 ------> the engine of 200 answers meanwhile, where memory allows both
             <-- Ready 300 -----
             -- Retire 200 ----> that one ends with its last answer

Every engine has a thread of its own; an answer never continues on another one. Only wiring.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

import msgspec
import torch

from smolrun.errors import SmolrunError, StopRequested
from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import StartMessage, TaskMessage, decode_data
from smolrun.launch.machine_memory import gb
from smolrun.mesh.mesh import Mesh
from smolrun.serving.messages import (
    LOADING,
    TOPIC,
    Cancel,
    Finished,
    FromEngine,
    Load,
    NotLoaded,
    Ping,
    Probe,
    Ready,
    Retire,
    StepOutput,
    Submit,
    ToEngine,
    ToRank,
)
from smolrun.serving.pipeline import PipelineHead
from smolrun.serving.source import ModelSource
from smolrun.serving.stage import Stage
from smolrun.serving.weight_types import serving_bytes
from smolrun.worker.memory_limit import free_memory, limit_memory
from smolrun.worker.serve import (
    engine_for,
    grammars_of,
    load_part,
    measure,
    runner_of,
    scheduler_for,
    vocabulary_from,
)
from smolrun.worker.serving_host import host_watched
from smolrun.worker.train import late, pace_of, pick_device

_SPARE_BYTES = 200e6  # beside weights and cache, as estimate/serving_plan.py has it
_FIRST_TOKEN_S = 600.0
_LAST_S = 60.0  # for an engine to end, once it was stopped


def serve_replica(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """Until the driver stops the run; returns the rank's summary. Raises what ends an engine, and
    StopRequested if the driver stops it before it has loaded anything."""
    with host_watched(start, channel, pick_device(start.device)):
        _Replica(start, mesh, channel).run()
    return {"was_stopped": True}


class _EngineThread(threading.Thread):
    """An engine until it ends, which is put into `inbox`. `failure`: the error that ended it."""

    def __init__(
        self,
        load: Load,
        source: ModelSource,
        stage: Stage,
        rank: _Replica,
    ) -> None:
        super().__init__(name=f"smolrun-engine-{load.version}", daemon=True)
        self.version, self.is_ready = load.version, False
        self.failure: BaseException | None = None
        self.pace = pace_of(rank.start.config, rank.start.rank)
        self._inbox, self._channel = rank.inbox, rank.channel
        self._has_begun = threading.Event()
        self.engine = engine_for(scheduler_for(load, source), self._send, load.version)
        grammars = grammars_of(rank.vocabulary, source)
        at = (rank.start.rank, rank.start.host)
        runner, times = runner_of(load, stage, *at, self.pace, grammars)
        self._head = PipelineHead(rank.mesh, load.stages, runner, times, self.engine.on_result)

    def run(self) -> None:
        """`Engine.run`."""
        try:
            self.engine.run(self._head)
        except BaseException as error:
            self.failure = error
        self._has_begun.set()
        self._inbox.put(self)

    def begin(self) -> None:
        """Blocks until the engine takes requests; raises what it has failed with before."""
        self.start()
        if not self._has_begun.wait(_FIRST_TOKEN_S):
            raise SmolrunError(f"the model computed no token within {_FIRST_TOKEN_S:g} s")
        if not self.is_ready and self.failure is not None:
            raise self.failure

    def _send(self, message: FromEngine) -> None:
        self._channel.send_data(TOPIC, message)
        if isinstance(message, Ready):
            self.is_ready = True
            self._has_begun.set()


class _Replica:
    """The engines of this rank: that of the newest weights, and older ones that still answer."""

    def __init__(self, start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> None:
        self.start, self.mesh, self.channel = start, mesh, channel
        self.inbox: queue.SimpleQueue[ToRank | _EngineThread | None] = queue.SimpleQueue()
        self.vocabulary = vocabulary_from(channel)
        self._rank = start.rank
        self._device = torch.device(pick_device(start.device))
        self._limit = limit_memory(start, self._device.type, channel.emit)
        self._engines: dict[int, _EngineThread] = {}  # by version, those that take requests
        self._retired: set[_EngineThread] = set()  # that have answers to end

        def take(message: TaskMessage) -> None:
            self.inbox.put(decode_data(message, ToRank))  # type: ignore[arg-type]  # a union

        channel.subscribe(LOADING, take)
        channel.subscribe(TOPIC, self._take_request)
        channel.on_stop(lambda: self.inbox.put(None))

    def run(self) -> None:
        """Until the driver stops the run. Raises what has ended an engine."""
        while (message := self.inbox.get()) is not None:
            if isinstance(message, Probe):
                pace = pace_of(self.start.config, self._rank)
                probed = measure(message, self._rank, self._device, pace, self._limit)
                self.channel.send_data(LOADING, probed)
            elif isinstance(message, Load):
                self._load(message)
            elif message.failure is not None:
                raise message.failure
            else:
                self._retired.discard(message)
        newest = next(reversed(self._engines.values()), None)
        if newest is None:
            raise StopRequested("the driver asked this rank to stop before it began")
        self._stop_engines()
        if too_slow := late(newest.pace, self._rank):
            self.channel.emit(too_slow)

    def _load(self, load: Load) -> None:
        source = msgspec.convert(load.source, ModelSource)
        source = msgspec.structs.replace(source, folder=load.folders[self._rank])
        if not load.beside:
            self._stop_engines()
        elif lacks := self._lacks_memory(load, source):
            self._refuse(load, lacks, lacks_memory=True)
            return
        try:
            self._begin(load, source)
        except (SmolrunError, OSError, RuntimeError, MemoryError) as error:
            if not load.beside:
                raise
            self._refuse(load, str(error) or type(error).__name__)

    def _begin(self, load: Load, source: ModelSource) -> None:
        stage = load_part(load, source, self._rank, self.channel, self._device, None)
        engine = _EngineThread(load, source, stage, self)
        self._engines[load.version] = engine  # before Ready, after which requests come
        try:
            engine.begin()
        except BaseException:
            engine.failure = None  # reported by the caller
            del self._engines[load.version]
            raise

    def _lacks_memory(self, load: Load, source: ModelSource) -> str:
        """Why these weights have no room beside the old ones; empty where they have."""
        sizes = serving_bytes(source.shape, source.vocab_size, load.dtype, source.group_size)
        cache = load.slots * load.capacity * sizes.layers * sizes.cache_per_token
        needed = sizes.weights + cache + _SPARE_BYTES
        free = free_memory(self.start, self._device.type, self._limit)
        if needed <= free:
            return ""
        return f"they need {gb(needed)} beside the old ones, {gb(max(0.0, free))} are available"

    def _refuse(self, load: Load, reason: str, *, lacks_memory: bool = False) -> None:
        message = NotLoaded(self._rank, load.version, reason[:1000], lacks_memory)
        self.channel.send_data(LOADING, message)

    def _stop_engines(self) -> None:
        running = [*self._engines.values(), *self._retired]
        for one in running:
            one.engine.stop()
        for one in running:
            one.join(_LAST_S)
        self._engines.clear()
        self._retired.clear()

    def _take_request(self, message: TaskMessage) -> None:
        """On the thread that reads what the driver sends."""
        request: ToEngine = decode_data(message, ToEngine)  # type: ignore[arg-type]  # a union
        if isinstance(request, Ping):
            self.channel.send_data(TOPIC, StepOutput())
        elif isinstance(request, Cancel):
            for one in (*self._engines.values(), *self._retired):
                one.engine.submit(request)
        elif isinstance(request, Retire):
            if (retired := self._engines.pop(request.version, None)) is not None:
                self._retired.add(retired)
                retired.engine.finish()
        elif (asked := self._engines.get(request.version)) is not None:
            asked.engine.submit(request)
        else:
            self.channel.send_data(TOPIC, _not_here(request))


def _not_here(request: Submit) -> StepOutput:
    reason = f"the weights of step {request.version} are not loaded here"
    choices = range(request.choices)
    return StepOutput(
        finished=[Finished(request.request, choice, "error", 0, reason) for choice in choices]
    )
