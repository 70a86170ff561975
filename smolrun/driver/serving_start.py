"""From started ranks to a loaded model: measure, cut the layers, bring the parts, load.

rank 0 .. n-1  <-- Probe ---  driver        a layer's time, free memory; no weights yet
               --- Probed ->  plan          which layers where, or a sentence why it does not fit
hosts          <-- parts ---  (a thread)    each host its own layers, by hash
               <-- Load ----
               --- Loaded ->
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from smolrun.config import RunConfig, ranks
from smolrun.errors import ProtocolError, SmolrunError
from smolrun.estimate.serving_plan import DoesNotFit, ServingPlan, ServingRank, plan_for
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.launch.driver import Driver, Subscriber
from smolrun.models.shape import ModelBytes
from smolrun.serving.messages import (
    LOADING,
    FromRank,
    Load,
    Loading,
    Probe,
    Probed,
    ServingDtype,
    ToRank,
)
from smolrun.serving.source import ModelSource

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ServingSpec:
    """What is to be loaded: the model, its sizes, and the type of its numbers."""

    source: ModelSource
    sizes: ModelBytes
    dtype: ServingDtype


class ModelLoader(Subscriber):
    """Has every rank measure, then load its part. `earlier` are the layers of an earlier start;
    `on_plan` gets the plan before anything loads, `deliver(plan)` returns the source for the ranks
    and the folder of the model on the host of each, in a thread."""

    topic = LOADING

    def __init__(
        self,
        config: RunConfig,
        spec: ServingSpec,
        deliver: Callable[[ServingPlan], tuple[ModelSource, list[str]]],
        *,
        earlier: list[range] | None = None,
        on_plan: Callable[[ServingPlan], None],
        progress: Progress,
    ) -> None:
        self._config = config
        self._earlier = earlier
        self._spec = spec
        self._deliver = deliver
        self._on_plan = on_plan
        self._progress = progress
        self._ranks = ranks(config)
        self._driver: Driver | None = None
        self._probed: dict[int, Probed] = {}
        self._loading: dict[int, tuple[int, int]] = {}
        self._plan: ServingPlan | None = None
        self._delivered: tuple[ModelSource, list[str]] | Exception | None = None
        self._has_loaded = False

    def on_start(self, driver: Driver) -> None:
        """Ask every rank to measure."""
        self._driver = driver
        source = msgspec.to_builtins(self._spec.source)
        for rank in driver.ranks:
            self._send(rank, Probe(source=source, dtype=self._spec.dtype))

    def on_message(self, rank: int, message: TaskMessage) -> None:
        """A measurement, or how far the loading is."""
        news: FromRank = decode_data(message, FromRank)  # type: ignore[arg-type]  # a union is fine
        if news.rank != rank:
            raise ProtocolError(f"sent a message of rank {news.rank}")
        if isinstance(news, Probed):
            self._probed[rank] = news
            if len(self._probed) == len(self._ranks) and self._plan is None:
                self._decide()
        elif isinstance(news, Loading):
            self._show(rank, news.done, news.total)

    def on_poll(self) -> None:
        """Once the parts are there, tell all ranks to load."""
        found, self._delivered = self._delivered, None
        if isinstance(found, Exception):
            self._fail(found)
        elif found is not None:
            self._load(*found)

    def _decide(self) -> None:
        found = [
            ServingRank(
                host=plan.host,
                layer_s=max(self._probed[plan.rank].layer_s, 1e-9),
                head_s=self._probed[plan.rank].head_s,
                free_bytes=self._probed[plan.rank].free_bytes / plan.local_world_size,
            )
            for plan in self._ranks
        ]
        try:
            longest = self._spec.source.shape.max_sequence_length
            self._plan = plan_for(self._config, self._spec.sizes, longest, found, self._earlier)
        except (SmolrunError, ValueError) as error:
            self._fail(error)
            return
        self._on_plan(self._plan)
        thread = threading.Thread(target=self._bring, name="smolrun-parts", daemon=True)
        thread.start()

    def _bring(self) -> None:
        """On a thread of its own: the driver continues with leases, signals and the ranks."""
        assert self._plan is not None, "the parts follow the plan"
        try:
            self._delivered = self._deliver(self._plan)
        except Exception as error:  # of a host, a disk or a library; the driver reports it
            self._delivered = error

    def _load(self, source: ModelSource, folders: list[str]) -> None:
        assert self._plan is not None, "the parts follow the plan"
        serving = self._config.serving
        load = Load(
            source=msgspec.to_builtins(source),
            dtype=self._spec.dtype,
            stages=self._plan.stages,
            last_layers=[self._plan.layers[rank].stop - 1 for rank in self._plan.stages],
            folders=folders,
            slots=self._plan.slots,
            capacity=self._plan.capacity,
            chunk_tokens=serving.prefill_chunk,
            prefix_reuse=serving.prefix_reuse,
            batch_invariant=serving.batch_invariant,
        )
        for rank in range(len(self._ranks)):
            self._send(rank, load)

    def _show(self, rank: int, done: int, total: int) -> None:
        self._loading[rank] = (done, total)
        together = [sum(column) for column in zip(*self._loading.values(), strict=True)]
        if not self._has_loaded:
            self._progress("loading the model", *together)
        self._has_loaded = together[0] == together[1]

    def _send(self, rank: int, message: ToRank) -> None:
        assert self._driver is not None, "the driver has started"
        self._driver.send(rank, task_message(LOADING, message))

    def _fail(self, error: Exception) -> None:
        assert self._driver is not None, "the driver has started"
        if isinstance(error, DoesNotFit):
            error = DoesNotFit(f"{self._spec.source.name} does not fit: {error}")
        what = (
            error
            if isinstance(error, SmolrunError | ValueError)
            else f"{type(error).__name__}: {error}"
        )
        self._driver.fail(str(what))
