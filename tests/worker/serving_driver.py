"""A driver for `worker.serve` in this process: ranks are threads, and their channels are queues."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import cast

import msgspec

from smolrun.events import Event
from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import Links, TaskMessage, decode_data, task_message
from smolrun.mesh.mesh import Mesh
from smolrun.models.sampling import Sampling
from smolrun.serving.messages import (
    HOSTS,
    LOADING,
    TOPIC,
    Finished,
    FromEngine,
    FromRank,
    Load,
    Loaded,
    NotLoaded,
    Probe,
    Probed,
    Ready,
    Recovering,
    StepOutput,
    Submit,
    ToEngine,
    ToRank,
    Vocabulary,
)
from smolrun.serving.source import ModelSource
from smolrun.testing import run_ranks
from smolrun.worker.replica import serve_replica
from smolrun.worker.serve import serve
from tests.launch.test_control import START
from tests.waiting import SOON_S

GREEDY = Sampling(temperature=0.0)


class Channel:
    """What a rank sees of the driver."""

    def __init__(self, rank: int, inbox: queue.SimpleQueue[tuple[int, TaskMessage]]) -> None:
        self.stop_requested = threading.Event()
        self._rank, self._inbox = rank, inbox
        self._lock = threading.Lock()
        self._handlers: dict[str, Callable[[TaskMessage], None]] = {}
        self._early: dict[str, list[TaskMessage]] = defaultdict(list)
        self._stop_callbacks: list[Callable[[], None]] = []

    def subscribe(self, topic: str, handler: Callable[[TaskMessage], None]) -> None:
        with self._lock:
            self._handlers[topic] = handler
            early = self._early.pop(topic, [])
        for message in early:
            handler(message)

    def emit(self, event: Event) -> None:
        """No one listens."""

    def on_stop(self, callback: Callable[[], None]) -> None:
        with self._lock:
            self._stop_callbacks.append(callback)
            has_stopped = self.stop_requested.is_set()
        if has_stopped:
            callback()

    def send_data(self, topic: str, data: msgspec.Struct) -> None:
        self._inbox.put((self._rank, task_message(topic, data)))

    def tell(self, topic: str, data: ToRank | ToEngine | Vocabulary) -> None:
        """From the driver."""
        message = task_message(topic, data)
        with self._lock:
            handler = self._handlers.get(topic)
            if handler is None:
                self._early[topic].append(message)
        if handler is not None:
            handler(message)

    def stop(self) -> None:
        with self._lock:
            self.stop_requested.set()
            callbacks = list(self._stop_callbacks)
        for callback in callbacks:
            callback()


class ServingDriver:
    """The driver's side of a server; `rows` are what the ranks measured and loaded."""

    def __init__(self, world_size: int) -> None:
        self.inbox: queue.SimpleQueue[tuple[int, TaskMessage]] = queue.SimpleQueue()
        self.channels = [Channel(rank, self.inbox) for rank in range(world_size)]
        self.probed: dict[int, Probed] = {}
        self.loaded: dict[int, Loaded] = {}
        self.not_loaded: list[NotLoaded] = []
        self.ready: Ready | None = None
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.finished: dict[tuple[str, int], Finished] = {}
        self.output: list[StepOutput] = []
        self.pauses: list[str] = []
        self.meshes: dict[int, Mesh] = {}  # of the first generation

    def probe(self, source: ModelSource, dtype: str = "float32") -> None:
        """Every rank measures."""
        probe = msgspec.convert({"source": msgspec.to_builtins(source), "dtype": dtype}, Probe)
        for channel in self.channels:
            channel.tell(LOADING, probe)
        while len(self.probed) < len(self.channels):
            self.take()

    def load(self, load: Load) -> None:
        """Every rank loads, and a token flows."""
        for channel in self.channels:
            channel.tell(LOADING, load)
        while self.ready is None or len(self.loaded) < len(self.channels):
            self.take()

    def run(self, *requests: Submit) -> None:
        """Until all choices of the requests have finished."""
        for request in requests:
            self.channels[0].tell(TOPIC, request)
        wanted = {(one.request, choice) for one in requests for choice in range(one.choices)}
        while not wanted <= self.finished.keys():
            self.take()

    def take(self) -> None:
        """The next message of a rank."""
        rank, message = self.inbox.get(timeout=SOON_S)
        if message.topic == HOSTS:  # the memory of its host
            return
        if message.topic == LOADING:
            news = decode_data(message, FromRank)  # type: ignore[arg-type, var-annotated]
            if isinstance(news, Probed):
                self.probed[rank] = news
            elif isinstance(news, Loaded):
                self.loaded[rank] = news
            elif isinstance(news, NotLoaded):
                self.not_loaded.append(news)
            return
        output = decode_data(message, FromEngine)  # type: ignore[arg-type, var-annotated]
        if isinstance(output, Ready):
            self.ready = output
            return
        if isinstance(output, Recovering):
            self.pauses.append(output.reason)
            return
        self.output.append(output)
        for token in output.tokens:
            self.tokens[token.request, token.choice].append(token.id)
        for finished in output.finished:
            self.finished[finished.request, finished.choice] = finished


def load_of(source: ModelSource, stages: list[int], world_size: int, **more: object) -> Load:
    """Layers in equal parts."""
    layers = source.shape.layers
    ends = [layers * (index + 1) // len(stages) - 1 for index in range(len(stages))]
    keys = {
        "source": msgspec.to_builtins(source),
        "dtype": "float32",
        "stages": stages,
        "last_layers": ends,
        "folders": [source.folder] * world_size,
        "slots": 8,
        "capacity": 128,
        **more,
    }
    return msgspec.convert(keys, Load)


def serve_with(
    script: Callable[[ServingDriver], None],
    world_size: int,
    *,
    kind: str = "memory",
    links: Links = "all",
) -> ServingDriver:
    """Run `script` beside so many ranks of a server, then stop them."""
    driver = ServingDriver(world_size)
    errors: list[BaseException] = []

    def run_script() -> None:
        try:
            script(driver)
        except BaseException as error:
            errors.append(error)
        for channel in driver.channels:
            channel.stop()

    def work(mesh: Mesh) -> None:
        driver.meshes[mesh.rank] = mesh
        facts = {"rank": mesh.rank, "host": "here", "device": "cpu", "links": links}
        start = msgspec.structs.replace(START, **facts)
        begin = serve_replica if links == "none" else serve
        summary = begin(start, mesh, cast(WorkerChannel, driver.channels[mesh.rank]))
        assert summary == {"was_stopped": True}

    thread = threading.Thread(target=run_script, name="script", daemon=True)
    thread.start()
    try:
        run_ranks(world_size, work, kind=kind)
    finally:
        thread.join(SOON_S)
        if errors:
            raise errors[0]
    return driver
