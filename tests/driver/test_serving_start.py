"""Which ranks load what, at the start and after their change; without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.config import RunConfig
from smolrun.driver import serving_start
from smolrun.driver.serving_start import ModelLoader, ServingSpec
from smolrun.errors import HostError
from smolrun.estimate.serving_plan import ServingPlan
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.models.shape import ModelBytes
from smolrun.serving.messages import LOADING, Load, Probe, Probed, ToRank
from smolrun.serving.source import ModelSource
from tests.models.tiny import TINY, make_tiny_decoder
from tests.waiting import until

RANKS = 3
LAYERS = 6
FREE = 2 * 10**9


class Ranks:
    """What the driver sends, and how it ends; `deliver` is what brings the parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
        self.ranks = list(range(RANKS))
        self.sent: list[tuple[int, Probe | Load]] = []
        self.problems: list[str] = []
        self.delivered: list[ServingPlan] = []
        self.wanted: list[bool] = []
        self.hold, self.failure = threading.Event(), None
        self.hold.set()
        shape = make_tiny_decoder(**{**TINY, "layers": LAYERS}).shape
        source = ModelSource(
            "tiny", "huggingface", "folder", "smolrun", shape, 61, "float32", [], None
        )
        config: RunConfig = compose(
            ["task=serve", "serving=pipeline", *(overrides or [f"cluster.ranks={RANKS}"])]
        )
        monkeypatch.setattr(serving_start, "_CHANGE_S", 0.0)
        # Layers of 50 MB, beside 200 MB that a rank needs anyway.
        sizes = ModelBytes(LAYERS, 50 * 10**6, 1, 1, 0, 1000)
        self.loader = ModelLoader(
            config,
            ServingSpec(source, {"float32": sizes}),
            self._deliver,
            on_plan=lambda *_: None,
            progress=lambda *_: None,
        )
        self.loader.on_start(self)  # type: ignore[arg-type]

    # -- as the driver ----

    def send(self, rank: int, message: TaskMessage) -> None:
        self.sent.append((rank, decode_data(message, ToRank)))  # type: ignore[arg-type]

    def fail(self, problem: str) -> None:
        self.problems.append(problem)

    def _deliver(
        self, plan: ServingPlan, is_wanted: Callable[[], bool]
    ) -> tuple[ModelSource, list[str]]:
        failure = self.failure
        assert self.hold.wait(20)
        self.delivered.append(plan)
        self.wanted.append(is_wanted())
        if failure is not None:
            raise failure
        return self.loader._spec.source, ["folder"] * RANKS

    # -- for tests ----

    def measure(self, *ranks: int, free: int = FREE, layer_s: float = 1.0) -> None:
        for rank in ranks:
            message = task_message(LOADING, Probed(rank, layer_s, 0.1, free))
            self.loader.on_message(rank, message)

    def loads(self) -> dict[int, Load]:
        """What the ranks are asked to load now; waited for."""

        def is_there() -> bool:
            self.loader.on_poll()
            return any(isinstance(message, Load) for _, message in self.sent) or bool(self.problems)

        until(is_there)
        sent, self.sent = self.sent, []
        return {rank: message for rank, message in sent if isinstance(message, Load)}

    def probed(self) -> list[int]:
        sent, self.sent = self.sent, []
        return [rank for rank, message in sent if isinstance(message, Probe)]


def cut_of(load: Load) -> dict[int, int]:
    """The last layer of each rank that has some."""
    return dict(zip(load.stages, load.last_layers, strict=True))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks(monkeypatch, f"cluster.ranks={RANKS}", "serving.layers=[[0,0],[1,2],[3,5]]")
    assert ranks.probed() == [0, 1, 2]
    ranks.measure(0, 1, 2)
    return ranks


def test_nothing_loads_before_the_ranks_are_linked(ranks: Ranks) -> None:
    assert ranks.loader.if_lost() == {}
    ranks.loader.on_regrouped([0, 1, 2], 0)
    loads = ranks.loads()
    assert loads.keys() == {0, 1, 2}
    assert all(cut_of(load) == {0: 0, 1: 2, 2: 5} for load in loads.values())
    assert {load.generation for load in loads.values()} == {0}


def test_the_layers_are_cut_over_those_that_are_left_and_given_ones_return(ranks: Ranks) -> None:
    ranks.loader.on_regrouped([0, 1, 2], 0)
    ranks.loads()
    ranks.loader.on_regrouped([0, 2], 1)
    loads = ranks.loads()
    assert loads.keys() == {0, 2}
    assert cut_of(loads[0]) == {0: 2, 2: 5}
    assert loads[2].generation == 1
    ranks.loader.on_restart(1)
    assert ranks.probed() == [], "the others of its machine hold layers now: it would find less"
    ranks.loader.on_regrouped([0, 1, 2], 2)
    assert cut_of(ranks.loads()[1]) == {0: 0, 1: 2, 2: 5}


HOSTS = (
    f"cluster.hosts=[{','.join(f'{{name:mini{rank},ssh:mini{rank}}}' for rank in range(RANKS))}]"
)


def on_hosts(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """A loaded server on a host a rank, without rank 1, which is being started again."""
    ranks = Ranks(monkeypatch, HOSTS, "serving.hosts=all")
    ranks.probed()
    ranks.measure(0, 1, 2)
    ranks.loader.on_regrouped([0, 1, 2], 0)
    assert cut_of(ranks.loads()[0]) == {0: 1, 1: 3, 2: 5}
    ranks.loader.on_regrouped([0, 2], 1)
    assert cut_of(ranks.loads()[0]) == {0: 2, 2: 5}
    ranks.loader.on_restart(1)
    assert ranks.probed() == [1]
    ranks.loader.on_regrouped([0, 1, 2], 2)
    return ranks


@pytest.mark.parametrize(("layer_s", "cut"), [(1.9, {0: 1, 1: 3, 2: 5}), (4.0, {0: 1, 1: 2, 2: 5})])
def test_a_host_that_is_back_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, layer_s: float, cut: dict[int, int]
) -> None:
    """It gets the layers that it had before, unless it is far slower now."""
    ranks = on_hosts(monkeypatch)
    assert ranks.loader.if_lost() == {}, "it has not measured yet"
    ranks.measure(1, layer_s=layer_s)
    assert cut_of(ranks.loads()[0]) == cut


def test_a_host_that_is_back_with_less_memory_ends_no_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = on_hosts(monkeypatch)
    ranks.measure(1, free=210 * 10**6)
    assert cut_of(ranks.loads()[0]) == {0: 2, 2: 5}
    assert ranks.problems == []


def test_what_was_on_its_way_to_ranks_that_have_changed_is_dropped(ranks: Ranks) -> None:
    ranks.hold.clear()
    ranks.loader.on_regrouped([0, 1, 2], 0)
    ranks.failure = HostError("mini2", "it is gone")
    ranks.loader.on_regrouped([0, 2], 1)
    ranks.failure = None
    ranks.loader.on_regrouped([0, 1], 2)
    ranks.hold.set()
    until(lambda: len(ranks.delivered) == 3)
    loads = ranks.loads()
    assert loads.keys() == {0, 1}
    assert {load.generation for load in loads.values()} == {2}
    assert ranks.problems == []
    assert sorted(ranks.wanted) == [False, False, True], "what is left of it is not sent"


def test_a_rank_lost_before_it_has_measured_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    ranks.probed()
    ranks.measure(0, 1)
    ranks.loader.on_regrouped([0, 1, 2], 0)
    assert ranks.loader.if_lost() == {}
    ranks.loader.on_restart(2)
    assert ranks.probed() == [2]
    ranks.loader.on_regrouped([0, 1], 1)  # until it is back
    assert ranks.loads().keys() == {0, 1}


def test_what_fits_on_no_ranks_that_are_left_ends_the_server(ranks: Ranks) -> None:
    ranks.loader.on_regrouped([0, 1, 2], 0)
    ranks.loads()
    ranks.measure(0, free=350 * 10**6)
    ranks.loader.on_regrouped([0], 1)
    assert ranks.loads() == {}
    assert "tiny does not fit" in ranks.problems[0]


def test_what_every_loss_would_mean_is_known_before(ranks: Ranks) -> None:
    """With serving.spare hosts get their layers of these plans."""
    ranks.loader.on_regrouped([0, 1, 2], 0)
    ranks.loads()
    plans = ranks.loader.if_lost()
    assert {rank: plan.layers for rank, plan in plans.items() if plan} == {
        1: [range(3), range(0), range(3, 6)],
        2: [range(3), range(3, 6), range(0)],
    }
    ranks.measure(1, free=500 * 10**6)  # without rank 2 it has to hold some layers: too few
    ranks.measure(0, free=700 * 10**6)
    plans = ranks.loader.if_lost()
    assert plans[2] is None and plans[1] is not None


@pytest.mark.parametrize("error", [HostError("mini2", "its disk is full"), OSError("no cache")])
def test_parts_that_cannot_be_brought_end_the_server(ranks: Ranks, error: Any) -> None:
    ranks.failure = error
    ranks.loader.on_regrouped([0, 1, 2], 0)
    assert ranks.loads() == {}
    assert str(error) in ranks.problems[0]
