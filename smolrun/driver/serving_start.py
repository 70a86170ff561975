"""From started ranks to a loaded model: measure, cut the layers, bring the parts, load.

rank 0 .. n-1  <-- Probe ---  driver        a layer's time, free memory; no weights yet
               --- Probed ->  plan          which layers where, or a sentence why it does not fit
hosts          <-- parts ---  (a thread)    each host its own layers, by hash
               <-- Load ----
               --- Loaded ->
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from smolrun.config import RunConfig, linked, ranks
from smolrun.errors import HostError, HostErrors, ProtocolError, SmolrunError
from smolrun.estimate.serving_plan import DoesNotFit, ServingPlan, ServingRank, first_that_fits
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.launch.driver import Driver, Subscriber
from smolrun.models.shape import ModelBytes
from smolrun.serving.json_grammar import vocabulary_messages
from smolrun.serving.messages import (
    LOADING,
    VOCABULARY,
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
# A second beside others that load or receive: times within this factor may be those of before, and
# other times would move layers and copies of layers between all hosts.
_SAME_SPEED = 2.0
_CHANGE_S = 30.0  # within which a host that did not take its layers is seen to be lost


@dataclass(frozen=True)
class ServingSpec:
    """What is to be loaded: the model, and its sizes by the types that its weights may have, in the
    order in which they are tried."""

    source: ModelSource
    models: Mapping[ServingDtype, ModelBytes]

    @property
    def dtype(self) -> ServingDtype:
        """The first type, in which ranks measure."""
        return next(iter(self.models))

    @property
    def sizes(self) -> ModelBytes:
        """Of the first type."""
        return self.models[self.dtype]

    def only(self, number: int) -> ServingSpec:
        """With one type left."""
        dtype = list(self.models)[number]
        return ServingSpec(self.source, {dtype: self.models[dtype]})


class VocabularySender(Subscriber):
    """Sends the bytes of all tokens to every new process of a rank, before its weights: ranks have
    no tokenizer, and grammars of answers need them."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._messages = [
            task_message(VOCABULARY, message) for message in vocabulary_messages(token_bytes)
        ]

    def on_start(self, driver: Driver) -> None:
        """To the first processes."""
        self._driver = driver
        for rank in driver.ranks:
            self.on_restart(rank)

    def on_restart(self, rank: int) -> None:
        """To a later one."""
        for message in self._messages:
            self._driver.send(rank, message)


def load_message(
    config: RunConfig,
    dtype: ServingDtype,
    source: ModelSource,
    plan: ServingPlan,
    folders: list[str],
    generation: int = 0,
) -> Load:
    """What ranks have to load."""
    serving = config.serving
    return Load(
        source=msgspec.to_builtins(source),
        dtype=dtype,
        stages=plan.stages,
        last_layers=[plan.layers[rank].stop - 1 for rank in plan.stages],
        folders=folders,
        slots=plan.slots,
        capacity=plan.capacity,
        chunk_tokens=serving.prefill_chunk,
        prefix_reuse=serving.prefix_reuse,
        batch_invariant=serving.batch_invariant,
        generation=generation,
        version=source.step,
    )


def problem_text(error: Exception, name: str, where: str = "") -> str:
    """Why a model cannot be loaded, for the end of the run."""
    if isinstance(error, DoesNotFit):
        return f"{name} does not fit{where}: {error}"
    known = isinstance(error, SmolrunError | ValueError)
    return str(error) if known else f"{type(error).__name__}: {error}"


class ModelLoader(Subscriber):
    """Has every rank measure, then load its part. `earlier` are the layers of an earlier start;
    `on_plan` gets the plan before anything loads, and which type of weights it is for;
    `deliver(plan, is_wanted)` returns the source for the ranks and the folder of the model on the
    host of each, in a thread; it may stop once `is_wanted()` is false."""

    topic = LOADING

    def __init__(
        self,
        config: RunConfig,
        spec: ServingSpec,
        deliver: Callable[[ServingPlan, Callable[[], bool]], tuple[ModelSource, list[str]]],
        *,
        earlier: list[range] | None = None,
        on_plan: Callable[[ServingPlan, int], None],
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
        # By generation: what the ranks get, or why they cannot; written by a thread of each.
        self._delivered: dict[int, tuple[ModelSource, list[str]] | Exception] = {}
        self._failed: tuple[float, Exception] | None = None  # and when it is the end
        self._has_loaded = False
        self._present: list[int] = []  # the ranks of the generation, once they are linked
        self._generation = -1
        self._returned: set[int] = set()  # ranks that are in a later process
        self._before: dict[int, Probed] = {}  # what earlier processes measured

    def on_start(self, driver: Driver) -> None:
        """Ask every rank to measure."""
        self._driver = driver
        if linked(self._config) != "group":
            self._present, self._generation = driver.ranks, 0
        for rank in driver.ranks:
            self._probe(rank)

    def on_restart(self, rank: int) -> None:
        """What its old process measured may not be true any more, unless others of its host hold
        layers, whose memory would count as taken."""
        self._returned.add(rank)
        hosts = Counter(one.host for one in self._ranks)
        if rank in self._probed and hosts[self._ranks[rank].host] > 1:
            return
        if rank in self._probed:
            self._before[rank] = self._probed.pop(rank)
        self._probe(rank)

    def on_regrouped(self, ranks: list[int], generation: int) -> None:
        """Cut the layers over the ranks that are there now."""
        self._present, self._generation = ranks, generation
        self._plan, self._failed = None, None
        self._loading.clear()
        self._has_loaded = False
        self._decide()

    def _probe(self, rank: int) -> None:
        source = msgspec.to_builtins(self._spec.source)
        self._send(rank, Probe(source=source, dtype=self._spec.dtype))

    def on_message(self, rank: int, message: TaskMessage) -> None:
        """A measurement, or how far the loading is."""
        news: FromRank = decode_data(message, FromRank)  # type: ignore[arg-type]  # a union is fine
        if news.rank != rank:
            raise ProtocolError(f"sent a message of rank {news.rank}")
        if isinstance(news, Probed):
            self._probed[rank] = _with_earlier_times(news, self._before.get(rank))
            self._decide()
        elif isinstance(news, Loading):
            self._show(rank, news.done, news.total)

    def on_poll(self) -> None:
        """Once the parts are there, tell all ranks to load."""
        found = self._delivered.pop(self._generation, None)  # others are of ranks that changed
        if self._failed is not None and time.monotonic() >= self._failed[0]:
            self._fail(self._failed[1])
            self._failed = None
        if isinstance(found, Exception):
            # A host that is lost meanwhile is seen to be, and then others get its layers.
            is_change_possible = isinstance(found, HostError | HostErrors)
            waits_s = _CHANGE_S if is_change_possible and self._generation > 0 else 0.0
            self._failed = (time.monotonic() + waits_s, found)
        elif found is not None:
            self._load(*found)

    def _decide(self) -> None:
        """Once all ranks that are there have measured."""
        present = set(self._present)
        if not present or self._plan is not None or not present <= self._probed.keys():
            return
        try:
            number, self._plan = self._plan_over_present()
        except (SmolrunError, ValueError) as error:
            self._fail(error)
            return
        # From now on in this type: ranks that stay keep what they hold.
        self._spec = self._spec.only(number)
        if self.is_whole:
            self._earlier = self._plan.layers
        self._on_plan(self._plan, number)
        thread = threading.Thread(
            target=self._bring,
            args=(self._plan, self._generation, self.while_unchanged()),
            name="smolrun-parts",
            daemon=True,
        )
        thread.start()

    def if_lost(self) -> dict[int, ServingPlan | None]:
        """By stage: the plan for the others, or None where the model would not fit on them. Rank 0
        is needed."""
        is_known = self._plan is not None and set(self._present) <= self._probed.keys()
        stages = self._plan.stages if self._plan is not None and is_known else []
        plans: dict[int, ServingPlan | None] = {}
        for lost in [rank for rank in stages if rank != 0]:
            try:
                plans[lost] = self._plan_over([one for one in self._present if one != lost])[1]
            except DoesNotFit:
                plans[lost] = None
        return plans

    def _plan_over_present(self) -> tuple[int, ServingPlan]:
        """Without the ranks that are back where they have no room for a layer any more."""
        settled = [rank for rank in self._present if rank not in self._returned]
        try:
            return self._plan_over(self._present)
        except DoesNotFit:
            if len(settled) in (0, len(self._present)):
                raise
            return self._plan_over(settled)

    def _plan_over(self, present: list[int]) -> tuple[int, ServingPlan]:
        """Which type of weights fits on these ranks, and the plan, whose `layers` of the others are
        empty. Given layers, and those of an earlier start, are for all ranks."""
        hosts = Counter(self._ranks[rank].host for rank in present)
        found = [
            ServingRank(
                host=self._ranks[rank].host,
                layer_s=max(self._probed[rank].layer_s, 1e-9),
                head_s=self._probed[rank].head_s,
                free_bytes=self._probed[rank].free_bytes / hosts[self._ranks[rank].host],
            )
            for rank in present
        ]
        config, longest = self._config, self._spec.source.shape.max_sequence_length
        models = list(self._spec.models.values())
        if len(present) == len(self._ranks):
            return first_that_fits(config, models, longest, found, self._earlier)
        serving = config.serving.model_copy(update={"layers": None})
        config = config.model_copy(update={"serving": serving})
        number, made = first_that_fits(config, models, longest, found)
        layers = [range(0)] * len(self._ranks)
        for rank, part in zip(present, made.layers, strict=True):
            layers[rank] = part
        return number, replace(made, layers=layers)

    def while_unchanged(self) -> Callable[[], bool]:
        """Whether the ranks are still those of now; for any thread."""
        generation = self._generation
        return lambda: self._generation == generation

    @property
    def is_whole(self) -> bool:
        """Whether all ranks are there."""
        return len(self._present) == len(self._ranks)

    def _bring(self, plan: ServingPlan, generation: int, is_wanted: Callable[[], bool]) -> None:
        """On a thread of its own: the driver continues with leases, signals and the ranks."""
        try:
            self._delivered[generation] = self._deliver(plan, is_wanted)
        except Exception as error:  # of a host, a disk or a library; the driver reports it
            self._delivered[generation] = error

    def _load(self, source: ModelSource, folders: list[str]) -> None:
        assert self._plan is not None, "the parts follow the plan"
        dtype, plan = self._spec.dtype, self._plan
        load = load_message(self._config, dtype, source, plan, folders, self._generation)
        for rank in self._present:
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
        self._driver.fail(problem_text(error, self._spec.source.name))


def _with_earlier_times(new: Probed, old: Probed | None) -> Probed:
    """With the times of an earlier measurement, unless they differ by far."""
    if old is None or not 1 / _SAME_SPEED < new.layer_s / max(old.layer_s, 1e-9) < _SAME_SPEED:
        return new
    return msgspec.structs.replace(new, layer_s=old.layer_s, head_s=old.head_s)
