"""Several pipelines side by side (mp_pipeline with `replicas`) against `single`; which ranks hold,
read, sum and write the same."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.algorithms.contract import StepResult
from smolrun.algorithms.mp import ModelParallel
from smolrun.algorithms.mp_pipeline import mp_pipeline
from smolrun.algorithms.stage_gradients import StageGradients
from smolrun.errors import PeerLost, TrainingError
from smolrun.events import Event, ReplicaHash
from smolrun.mesh.mesh import Mesh
from smolrun.parts.norms import LayerNorms
from smolrun.parts.placement import least_of_stages, replica_weights
from smolrun.parts.quantization import Quantization
from smolrun.parts.replicas import parameter_hash
from smolrun.testing import FaultyPipe, run_ranks
from smolrun.training.replica_sync import ReplicaCheck, ReplicaSync
from tests.algorithms import worlds
from tests.algorithms.test_equivalence import difference
from tests.algorithms.test_fsdp_saved import worst
from tests.algorithms.test_mp_costs import HOP, MICRO_BATCHES, placed, step
from tests.algorithms.test_saved import contents, run_part, same
from tests.algorithms.worlds import Trace, train

STEPS = 5
DEEP = functools.partial(worlds.decoder, 4, tie_embeddings=True)


@functools.cache
def one_rank(model: str, staleness: int = 0, optimizer: str = "sgd") -> Trace:
    return train("single", model, 1, steps=STEPS, staleness=staleness, optimizer=optimizer)[0]


def pipelines(
    model: str, world_size: int, replicas: int, *, schedule: str = "1f1b", **keys: Any
) -> list[Trace]:
    overrides = {"replicas": replicas, "schedule": schedule}
    return train("mp_pipeline", model, world_size, overrides=overrides, **{"steps": STEPS, **keys})


def assert_equal(traces: list[Trace], replicas: int, reference: Trace) -> None:
    assert len(traces[0].results) == len(reference.results)
    stages = len(traces) // replicas
    for rank, trace in enumerate(traces):
        assert difference(trace, reference) <= 1e-12
        assert trace.losses == pytest.approx(reference.losses, abs=1e-12)
        # Clipping is on: a parameter that counted once for every replica would show here.
        norms = [one.grad_norm for one in reference.results]
        assert [one.grad_norm for one in trace.results] == pytest.approx(norms, abs=1e-12)
        assert trace.hashes == traces[rank % stages].hashes, "replicas are bit-equal"
        targets = [one.num_targets for one in reference.results]
        assert [one.num_targets for one in trace.results] == targets
        assert trace.eval is not None and reference.eval is not None
        assert trace.eval.loss == pytest.approx(reference.eval.loss, abs=1e-10)
        assert trace.eval.num_targets == reference.eval.num_targets
        assert trace.logits is not None and reference.logits is not None
        assert torch.allclose(trace.logits, reference.logits, rtol=0, atol=1e-6)


SOAK = pytest.mark.soak


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("model", [pytest.param("decoder", marks=SOAK), "tied"])
def test_two_pipelines_of_two_stages_equal_single(
    model: str, schedule: str, staleness: int
) -> None:
    keys: dict[str, Any] = {"staleness": staleness, "optimizer": "adamw"}
    traces = pipelines(model, 4, 2, schedule=schedule, **keys)
    assert traces[0].hashes[-1] != traces[1].hashes[-1], "stages differ"
    assert_equal(traces, 2, one_rank(model, **keys))


@pytest.mark.parametrize(
    ("model", "world_size", "replicas"),
    [
        ("tied", 2, 2),
        pytest.param("decoder", 3, 3, marks=SOAK),
        ("dropping", 4, 2),
        pytest.param("tied_recomputed", 6, 2, marks=SOAK),
    ],
)
def test_other_numbers_equal_single(model: str, world_size: int, replicas: int) -> None:
    assert_equal(pipelines(model, world_size, replicas), replicas, one_rank(model))


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("speeds", [[2.0, 4.0, 1.0, 2.0], [30.0, 30.0, 1.0, 1.0]])
def test_a_faster_pipeline_reads_more(speeds: list[float], staleness: int) -> None:
    """A slow one may get nothing, and still updates its stages as the other does."""
    keys: dict[str, Any] = {"staleness": staleness, "speeds": speeds, "micro_batch_size": 2}
    traces = pipelines("tied", 4, 2, **keys)
    shares = (8, 8, 4, 4) if speeds[0] == 2 else (12, 12, 0, 0)
    assert traces[0].results[0].samples == shares
    assert_equal(traces, 2, one_rank("tied", staleness))


def test_ranks_of_a_pipeline_read_the_same_samples_and_pipelines_others() -> None:
    def rank_main(mesh: Mesh) -> list[range]:
        context = worlds.context(mesh, "float64", "sgd", 0)
        made = mp_pipeline(context, schedule="1f1b", micro_batches="auto", layers=None, replicas=2)
        assert isinstance(made, ModelParallel)
        assert (made.replica, made.stage) == divmod(mesh.rank, 2)
        return worlds.plan_of(made).positions(1)

    first, also, second, too = run_ranks(4, rank_main)
    assert first == also and second == too
    read = [[sample for part in parts for sample in part] for parts in (first, second)]
    assert read == [list(range(12, 18)), list(range(18, 24))]


def test_shares_and_cut_follow_the_slowest_rank_of_each_stage() -> None:
    assert least_of_stages([4.0, 2.0, 1.0, 3.0], 2) == [1.0, 2.0]
    assert replica_weights([4.0, 2.0, 1.0, 3.0], 2) == [1.0, 1.0]
    assert replica_weights([4.0, 2.0, 2.0, 1.0], 2) == [2.0, 1.0]
    assert replica_weights([1.0, 5.0, 2.0], 3) == [1.0]
    assert least_of_stages((), 2) == []


def test_every_parameter_is_trained_in_one_step() -> None:
    torch.manual_seed(0)
    before = worlds.DECODERS["tied"]().double().state_dict()
    after = pipelines("tied", 4, 2, steps=1)[0].parameters
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_the_comparison_can_tell_that_nothing_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageGradients, "_sum", lambda self, step, group, gradients: None)
    assert difference(pipelines("decoder", 4, 2)[0], one_rank("decoder")) > 1e-6


@pytest.mark.parametrize(("precision", "kind"), [("bf16", "none"), ("float32", "int8")])
def test_replicas_are_bit_equal_over_sockets(precision: str, kind: str) -> None:
    """Also with quantized hidden states: gradients are summed as they are."""
    more = {"quantization": Quantization(kind), "expected_weight": 1 << 10}
    keys: dict[str, Any] = {"precision": precision, "optimizer": "adamw", "kind": "tls"}
    traces = pipelines("tied", 4, 2, staleness=1, more=more, **keys)
    assert traces[0].hashes == traces[2].hashes and traces[1].hashes == traces[3].hashes
    assert len(set(traces[0].hashes)) == STEPS
    exact = train("single", "tied", 1, precision=precision, steps=STEPS, staleness=1)[0]
    assert traces[0].losses[0] == pytest.approx(exact.losses[0], rel=0.02)


def test_norms_of_layers_are_those_of_the_whole() -> None:
    more = {"norms": LayerNorms("all", 2)}
    reference = train("single", "tied", 1, steps=3, more=more)[0].results
    for trace in pipelines("tied", 4, 2, steps=3, more=more):
        for found, expected in zip(trace.results, reference, strict=True):
            assert (found.norms is None) == (expected.norms is None)
            for what, layers in (expected.norms or {}).items():
                assert (found.norms or {})[what] == pytest.approx(layers, rel=1e-9)


# -- replicas that differ ----


def runner_of(mesh: Mesh, staleness: int = 0) -> ModelParallel:
    context = worlds.context(mesh, "float64", "sgd", staleness)
    made = mp_pipeline(context, schedule="1f1b", micro_batches="auto", layers=None, replicas=2)
    assert isinstance(made, ModelParallel)
    torch.manual_seed(mesh.rank)  # the ranks' threads share a generator; `place` makes them equal
    made.place(worlds.decoder(tie_embeddings=True).double())
    return made


def trained(runner: ModelParallel, steps: int) -> list[StepResult]:
    results, plan = [], worlds.plan_of(runner)
    for number in range(steps):
        batch = worlds.share(worlds.sample("decoder", number), plan, number)
        results.append(runner.train_step(batch))
    return [*filter(None, results), *runner.drain()]


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("bad", [0, 3])
def test_the_rank_whose_own_gradient_is_not_finite_is_named(bad: int, staleness: int) -> None:
    """And not the other replica of its stage, which gets the same sum."""

    def rank_main(mesh: Mesh) -> tuple[list[tuple[int, ...]], list[bool]]:
        runner = runner_of(mesh, staleness)
        calls = [0]
        count = len([size for size in worlds.plan_of(runner).sizes if size])

        def hurt(gradient: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return gradient * (torch.inf if calls[0] == count + 2 else 1.0)

        for model in (runner.model, *getattr(runner, "_versions", [])) if mesh.rank == bad else ():
            list(model.parameters())[-1].register_hook(hurt)
        results = trained(runner, 3)
        return [one.nonfinite_ranks for one in results], [one.grad_norm is None for one in results]

    for found, skipped in run_ranks(4, rank_main):
        assert found == [(), (bad,), ()]
        assert skipped == [False, True, False]


def test_a_replica_that_differs_is_found_and_made_equal_again() -> None:
    def rank_main(mesh: Mesh) -> tuple[list[str], str, list[str]]:
        runner = runner_of(mesh)
        events: list[Event] = []
        (result,) = trained(runner, 1)
        check = ReplicaCheck(runner, events.append)
        check.after_update(result)
        if mesh.rank == 3:
            with torch.no_grad():
                next(runner.model.parameters()).add_(1e-6)
        error = ""
        try:
            check.after_update(result)
        except TrainingError as caught:
            error = str(caught)
        ReplicaSync(runner, 1, events.append).run(0, 0)
        own = parameter_hash(runner.replica_tensors().values())
        return next(one.hashes for one in events if isinstance(one, ReplicaHash)), error, own

    found = run_ranks(4, rank_main)
    hashes, _, _ = found[0]
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]
    errors = [error for _, error, _ in found]
    assert errors[0] == errors[2] == "" and "differ after step 0 in " in errors[1]
    assert errors[1] == errors[3]
    assert [own for _, _, own in found] == hashes, "equal to the first replica again"


# -- checkpoints ----

LATE = pytest.mark.parametrize("staleness", [pytest.param(0, marks=SOAK), 2])


def saved(folder: Path, ranks: int, replicas: int, until: int, **keys: Any) -> tuple[Path, Any]:
    keys = {"model": DEEP, "overrides": {"replicas": replicas}, **keys}
    return run_part(folder, "mp_pipeline", ranks, until=until, **keys)


@LATE
def test_it_goes_on_to_the_same_bytes(tmp_path: Path, staleness: int) -> None:
    whole, hashes = saved(tmp_path / "a", 4, 2, 6, staleness=staleness)
    first, _ = saved(tmp_path / "b", 4, 2, 3, staleness=staleness)
    second, again = saved(tmp_path / "b", 4, 2, 6, staleness=staleness, resume=first)
    assert again == hashes and hashes[:2] == hashes[2:] and len(set(hashes)) == 2
    assert same(whole, second)


@LATE
def test_other_numbers_of_ranks_and_replicas_go_on_from_it(tmp_path: Path, staleness: int) -> None:
    keys: dict[str, Any] = {"model": DEEP, "staleness": staleness}
    whole, _ = run_part(tmp_path / "a", "single", 1, until=6, **keys)
    found: Path | None = None
    for until, (ranks, replicas) in enumerate([(4, 2), (2, 1), (4, 1), (4, 2), (2, 2)], start=1):
        found, _ = saved(
            tmp_path / str(until), ranks, replicas, until, staleness=staleness, resume=found
        )
    last, _ = run_part(tmp_path / "b", "single", 1, until=6, resume=found, **keys)
    assert contents(whole).keys() == contents(last).keys()
    assert worst(whole, last) < 1e-11


def test_one_copy_is_written_and_both_replicas_write(tmp_path: Path) -> None:
    two, _ = saved(tmp_path / "two", 4, 2, 2, staleness=1)
    one, _ = saved(tmp_path / "one", 2, 1, 2, staleness=1)
    assert contents(one).keys() == contents(two).keys()
    sizes = {path.name: path.stat().st_size for path in two.glob("*.safetensors")}
    alone = sum(path.stat().st_size for path in one.glob("*.safetensors"))
    assert {name.split("-")[0] for name in sizes} == {"rank0", "rank1", "rank2", "rank3"}
    assert sum(sizes.values()) == pytest.approx(alone, rel=0.1)  # headers apart


# -- costs, faults ----


def test_bytes_of_a_step_are_those_of_the_hops_and_of_the_sums() -> None:
    """A ring of two sends half of each sum to the other rank, and half of the result. The copy of a
    tied embedding is not summed."""

    def rank_main(mesh: Mesh) -> tuple[int, int]:
        made = placed(mesh, "mp_pipeline", replicas=2)
        step(made)
        made.collectives.barrier()
        before = mesh.bytes_sent
        made.collectives.barrier()
        step(made)
        made.collectives.barrier()
        return mesh.bytes_sent - before, sum(own.nbytes for own in made.trained())

    tied = 512 * 192 * 4
    for rank, (sent, held) in enumerate(run_ranks(4, rank_main, kind="tcp")):
        expected = MICRO_BATCHES * HOP + tied + held
        print(f"rank {rank}: {sent / expected:.4f} of the formula")
        assert expected <= sent <= 1.02 * expected


def test_a_lost_rank_of_one_pipeline_ends_the_other(tmp_path: Path) -> None:
    def rank_main(mesh: Mesh) -> PeerLost:
        runner = runner_of(mesh)
        with pytest.raises(PeerLost) as caught:
            trained(runner, 1000)
        return caught.value

    def wrap(rank: int) -> Any:
        return lambda pipe, peer, kind: FaultyPipe(pipe, cut_after=30_000) if rank == 3 else pipe

    for found in run_ranks(4, rank_main, kind="tcp", wrap=wrap, silence_s=2.0):
        assert isinstance(found, PeerLost)
