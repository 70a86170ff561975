"""The facts of every algorithm's class, what each refuses, and that a new class is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest
from pydantic import create_model

from smolrun import config
from smolrun.cli.compose import compose
from smolrun.config import (
    has_dedicated_server,
    problems,
    ranks,
    resolved,
    savers,
    validate,
    world_size,
)
from smolrun.config.algorithm import AlgorithmConfig
from smolrun.config.algorithms import CustomAlgorithmConfig
from smolrun.config.base import Count, chosen_by_target
from smolrun.config.settings import TrainingConfig
from smolrun.config.sharding import RankSizes, Sharding
from smolrun.config.suggest import problem
from smolrun.driver.prepare import spec_of
from smolrun.driver.trackers import can_quantize
from smolrun.errors import ConfigError
from smolrun.estimate.dry_run import estimate, largest_plan


@pytest.mark.parametrize(
    ("overrides", "is_lockstep", "can_delay", "has_replicas"),
    [
        (["algorithm=classicdp"], True, True, True),
        (["algorithm=fsdp", "algorithm.stage=2"], True, True, True),
        (["algorithm=fsdp", "algorithm.stage=3"], True, False, False),
        (["algorithm=syncps"], True, True, True),
        (["algorithm=syncps", "algorithm.straggler_timeout_s=1"], False, False, True),
        (["algorithm=edp"], False, False, False),
        (["algorithm=mp"], True, False, False),
        (["algorithm=mp_pipeline"], True, False, False),
        (["algorithm=mp_pipeline", "algorithm.replicas=2"], True, False, True),
        (["algorithm.target=json:loads"], True, True, True),
    ],
)
def test_facts(
    overrides: list[str], is_lockstep: bool, can_delay: bool, has_replicas: bool
) -> None:
    algorithm = compose([*overrides, "cluster.ranks=2"]).algorithm
    assert algorithm.is_lockstep is is_lockstep
    assert algorithm.can_delay_gradients is can_delay
    assert (not algorithm.why_no_replicas) is has_replicas


@pytest.mark.parametrize(
    ("overrides", "is_dedicated"),
    [
        (["algorithm=edp"], True),
        (["algorithm=edp", "algorithm.server_trains=true"], False),
        (["algorithm=syncps", "algorithm.server_trains=false"], True),
        (["algorithm=syncps"], False),
        (["algorithm=classicdp"], False),
    ],
)
def test_a_server_may_compute_no_samples(overrides: list[str], is_dedicated: bool) -> None:
    assert has_dedicated_server(compose([*overrides, "cluster.ranks=2"])) is is_dedicated


@pytest.mark.parametrize("stage", range(4))
def test_the_sharding_of_fsdp_is_of_its_stage(stage: int) -> None:
    sizes = RankSizes(1, 4, 0.25, 4, largest_parameter=2**21, largest_layer=2**22)
    algorithm = compose(["algorithm=fsdp"]).algorithm.with_stage(stage)
    assert algorithm is not None
    assert algorithm.sharding(sizes) == Sharding(stage, 0.25, 2**21, 2, layers=2**23)


def test_only_an_algorithm_with_stages_changes_them() -> None:
    assert compose(["algorithm=classicdp"]).algorithm.with_stage(1) is None


HOSTS = "cluster.hosts=[{name: mini1}, {name: pi5}]"


@pytest.mark.parametrize(
    ("overrides", "key", "what"),
    [
        (["algorithm=classicdp", HOSTS, "cluster.server=pi5"], "cluster.server = pi5", "no server"),
        ([HOSTS, "cluster.server=mini"], "cluster.server = mini", "did you mean mini1?"),
        (["cluster.server=pi4"], "cluster.server = pi4", "there are no cluster.hosts"),
        (
            ["cluster.ranks=1", "algorithm.server_trains=false"],
            "algorithm.server_trains = false",
            "the only rank",
        ),
        (
            ["algorithm.straggler_timeout_s=1", "staleness.bound=1"],
            "algorithm.straggler_timeout_s = 1.0",
            "staleness.bound",
        ),
        (
            ["algorithm.straggler_timeout_s=1", "training.check_replicas=true"],
            "algorithm.straggler_timeout_s = 1.0",
            "older weights",
        ),
        (
            ["algorithm.straggler_timeout_s=1", "training.resync_every=4"],
            "algorithm.straggler_timeout_s = 1.0",
            "needs all ranks",
        ),
        (
            ["algorithm.pull_weights=average"],
            "algorithm.pull_weights = average",
            "keeps no average",
        ),
        (
            ["algorithm.ema_decay=0.9", "precision=bf16_params"],
            "algorithm.ema_decay = 0.9",
            "more digits",
        ),
        (
            ["cluster.ranks=4", "algorithm.server_trains=false", "training.global_batch_size=2"],
            "training.global_batch_size = 2",
            "too small for 3 ranks",
        ),
    ],
)
def test_what_syncps_refuses(overrides: list[str], key: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["algorithm=syncps", *overrides])
    (line,) = [line for line in str(caught.value).splitlines() if key in line]
    assert what in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.straggler_timeout_s=1", "staleness.bound=0"],
        ["algorithm.straggler_timeout_s=1", "training.resync_every=0"],
        ["training.resync_every=4"],
        ["algorithm.ema_decay=0.9", "algorithm.pull_weights=average", "staleness.bound=2"],
        ["cluster.ranks=3", "algorithm.server_trains=false", "training.global_batch_size=2"],
        [HOSTS, "cluster.server=pi5", "precision=bf16_params"],
    ],
)
def test_what_syncps_allows(overrides: list[str]) -> None:
    compose(["algorithm=syncps", *overrides])


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["model=mlp", "data=digits"], "model = mlp: algorithm=mp cuts .* algorithm=fsdp"),
        (["cluster.ranks=5"], "model.layers = 3: too few for 5 ranks.*at most 3 ranks"),
        (["training.check_replicas=true"], "every layer on one rank only"),
        (["algorithm.layers=[[0,1],[1,2]]"], r"algorithm.layers = .*for each of 2 ranks.* 0 to 2"),
        (["algorithm.layers=[[0,0],[2,2]]"], "every layer belongs to one rank"),
        (["algorithm.layers=[[0,0],[1,1]]"], "every layer belongs to one rank"),
        (["algorithm.layers=[[0,2]]"], "every rank has some"),
        (["algorithm.layers=[[0,2],[]]"], "every rank has some"),
        (["algorithm.layers=[[1,0],[1,2]]"], "in the order of ranks"),
    ],
)
def test_what_stages_refuse(overrides: list[str], why: str) -> None:
    for algorithm in ("mp", "mp_pipeline"):
        with pytest.raises(ConfigError, match=why.replace("=mp ", f"={algorithm} ")):
            compose([f"algorithm={algorithm}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["algorithm=fsdp"], None),
        (["algorithm=mp"], "try algorithm=mp_pipeline"),
        (["algorithm=mp_pipeline"], "try algorithm.micro_batches=24"),
        (
            ["algorithm=mp_pipeline", "algorithm.micro_batches=20"],
            "try training.global_batch_size=64",
        ),
    ],
)
def test_what_stages_are_advised(overrides: list[str], advice: str | None) -> None:
    assert compose(overrides).algorithm.stage_advice(3, 32) == advice


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["algorithm.replicas=3"], r"replicas = 3: pipelines of equal length .*4 ranks.*: 1, 2, 4"),
        (["algorithm.replicas=8"], r"algorithm.replicas = 8: .*4 ranks.*allowed: 1, 2, 4"),
        (["algorithm.replicas=0"], r"algorithm.replicas = 0: "),
        (["algorithm.replicas=1"], "model.layers = 3: too few for 4 ranks"),
        (
            ["algorithm.replicas=2", "cluster.ranks=8"],
            r"too few for 2 pipelines of 4 ranks, each with a layer; .*>= 4, or at most 6 ranks",
        ),
        (["algorithm.replicas=2", "algorithm.layers=[[0,2]]"], "for each of 2 stages, layers 0 to"),
        (
            ["algorithm.replicas=2", "algorithm.micro_batches=17"],
            "global_batch_size = 32 for 2 pipelines; allowed: auto or 1 to 16",
        ),
    ],
)
def test_what_pipelines_refuse(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        compose(["algorithm=mp_pipeline", "cluster.ranks=4", *overrides])


def test_a_micro_batch_has_a_sample() -> None:
    few = ["algorithm=mp_pipeline", "training.global_batch_size=8"]
    assert compose([*few, "algorithm.micro_batches=8"])
    with pytest.raises(ConfigError, match=r"micro_batches = 9: more than the samples.*1 to 8"):
        compose([*few, "algorithm.micro_batches=9"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.layers=[[0,0],[1,2]]"],
        ["cluster.ranks=3", "algorithm.layers=[[0,0],[1,1],[2,2]]"],
        ["model=hf", "model.name=some/model", "algorithm.layers=[[0,20],[21,23]]"],
    ],
)
def test_layers_that_are_whole(overrides: list[str]) -> None:
    assert compose(["algorithm=mp", *overrides]).algorithm


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["training.check_replicas=true"], "no two need be equal"),
        (["training.resync_every=4"], "resync_every = 4.*no two need be equal"),
        (["algorithm.pushes_per_batch=99"], "parts without samples"),
        (
            ["cluster.ranks=3", "algorithm.min_ranks=5"],
            "min_ranks = 5: the run has only 3 ranks; allowed: 1 to 3, or more cluster.ranks",
        ),
        (
            ["cluster.hosts=[{name: mini1}, {name: pi5}]", "algorithm.min_ranks=3"],
            "min_ranks = 3: the run has only 2 ranks; allowed: 1 to 2, or more ranks in",
        ),
        (["algorithm.staleness_lr_scale=often"], "algorithm.staleness_lr_scale = often"),
        (
            ["data=hf", "data.path=a/b", "data.streaming=true"],
            "rows of a stream are requested",
        ),
    ],
)
def test_what_edp_refuses(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        compose(["algorithm=edp", *overrides])


def test_the_server_of_edp_alone_saves() -> None:
    config = compose(["algorithm=edp", "cluster.ranks=4"])
    assert savers(config) == 1
    assert config.algorithm.min_ranks == 2


@pytest.mark.parametrize(
    "overrides", [["cluster.ranks=1"], ["cluster.ranks=3", "algorithm.min_ranks=3"]]
)
def test_edp_may_need_all_ranks(overrides: list[str]) -> None:
    compose(["algorithm=edp", *overrides])


class GossipConfig(AlgorithmConfig):
    """All that smolrun/config/algorithms.py has to say of a new algorithm."""

    max_ranks: ClassVar[int | None] = 3
    is_asynchronous: ClassVar[bool] = True
    quantizes_gradients: ClassVar[bool] = True
    target: Literal["smolrun.algorithms.gossip:Gossip"]
    neighbours: Count

    @property
    def why_no_replicas(self) -> str:
        return "neighbours differ"

    def batch_parts(self, workers: int) -> int | None:
        return 2 * workers

    def check_neighbours(self, *, training: TrainingConfig, world_size: int) -> Iterator[str]:
        if self.neighbours >= world_size:
            yield problem("algorithm.neighbours", self.neighbours, "too many")

    def sharding(self, sizes: RankSizes) -> Sharding:
        return Sharding(links=self.neighbours)


@pytest.fixture
def gossip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration of that algorithm, which no other module knows."""
    shipped = resolved(compose(["model=mlp", "cluster.ranks=2"]))
    algorithms = chosen_by_target(CustomAlgorithmConfig, GossipConfig)
    extended = create_model("Extended", __base__=config.RunConfig, algorithm=(algorithms, ...))
    for module in (config, problems):
        monkeypatch.setattr(module, "RunConfig", extended)
    section = {"name": "gossip", "target": "smolrun.algorithms.gossip:Gossip", "neighbours": 1}
    return {**shipped, "algorithm": section}


def test_a_class_is_all_that_a_new_algorithm_needs(gossip: dict[str, Any]) -> None:
    made = validate(gossip)
    assert isinstance(made.algorithm, GossipConfig)
    assert made.algorithm.keywords() == {"neighbours": 1}
    assert (world_size(made), len(ranks(made)), savers(made)) == (2, 2, 1)
    assert largest_plan(made).sizes == (8,)  # a fourth of the batch
    assert can_quantize(made)
    dry_run = estimate(made, spec_of(made), measure_process=False)
    assert dry_run.rank(dry_run.places[0]).sharding == Sharding(links=1)


@pytest.mark.parametrize(
    ("group", "key", "value", "line"),
    [
        ("algorithm", "neighbours", 2, "algorithm.neighbours = 2: too many"),
        ("algorithm", "neighbours", 0, "algorithm.neighbours = 0: too small"),
        ("algorithm", "neighbors", 1, "did you mean algorithm.neighbours?"),
        ("cluster", "ranks", 4, "algorithm=gossip"),
        ("cluster", "server", "pi", "algorithm=gossip has no server"),
        ("training", "resync_every", 5, "neighbours differ"),
    ],
)
def test_its_rules_hold(
    gossip: dict[str, Any], group: str, key: str, value: Any, line: str
) -> None:
    gossip[group][key] = value
    with pytest.raises(ConfigError) as error:
        validate(gossip)
    assert [found for found in error.value.problems if line in found] == error.value.problems
