"""Models in stages (mp, mp_pipeline): what every stage holds, trains, measures and saves, and what
cannot be cut. That they equal `single` is in test_equivalence.py."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smolrun.algorithms.contract import StepResult
from smolrun.algorithms.mp import ModelParallel
from smolrun.algorithms.mp_pipeline import PipelineWithoutFlush, mp_pipeline
from smolrun.cli.compose import compose
from smolrun.errors import ConfigError, PeerLost
from smolrun.mesh.mesh import Mesh
from smolrun.models.huggingface import build
from smolrun.models.initialise import build_model, build_shell, first_value
from smolrun.parts.norms import LayerNorms
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.quantization import Quantization
from smolrun.targets import keywords, load_target
from smolrun.testing import FaultyPipe, run_ranks
from smolrun.training.optimizer import make_optimizer
from tests.algorithms import worlds
from tests.algorithms.test_fsdp_saved import worst
from tests.algorithms.test_saved import STEPS, run_part, same
from tests.algorithms.worlds import DECODERS, SPLIT, train
from tests.models.model_folders import save_model
from tests.models.test_huggingface import KEYS
from tests.models.tiny import Spec

TIED = "token_embedding.weight"
EACH = pytest.mark.parametrize("algorithm", SPLIT)


def placed(mesh: Mesh, model: torch.nn.Module, layers: Any = None, **more: Any) -> ModelParallel:
    context = worlds.context(mesh, "float64", "adamw", 0)
    runner = ModelParallel(dataclasses.replace(context, **more), layers=layers)
    runner.place(model)
    return runner


def runner_of(algorithm: str, mesh: Mesh, staleness: int = 0, **more: Any) -> ModelParallel:
    section = yaml.safe_load((worlds.CONF / "algorithm" / f"{algorithm}.yaml").read_text())
    context = worlds.context(mesh, "float64", "sgd", staleness)
    context = dataclasses.replace(context, **more)
    runner: ModelParallel = load_target(section["target"])(context, **keywords(section))
    return runner


def trained(runner: ModelParallel, steps: Iterable[int]) -> list[StepResult]:
    plan, results = worlds.plan_of(runner), []
    for step in steps:
        batch = worlds.sample("language_model", step)
        result = runner.train_step(worlds.share(batch, plan, step))
        results += [result] if result else []
    return results + runner.drain()


@pytest.mark.parametrize("model", ["decoder", "tied"])
@EACH
def test_every_parameter_of_every_stage_is_trained(algorithm: str, model: str) -> None:
    torch.manual_seed(0)
    before = DECODERS[model]().double().state_dict()
    after = train(algorithm, model, 3, steps=1)[0].parameters
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_rank_holds_its_layers_only_and_asks_for_their_values_only() -> None:
    asked: list[list[str]] = [[], [], []]

    def rank_main(mesh: Mesh) -> list[str]:
        def value(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> Any:
            asked[mesh.rank].append(name)
            return torch.full_like(parameter, 3.0)

        model = worlds.decoder(tie_embeddings=True)
        stage = placed(mesh, model, first_value=value).model
        assert all((parameter == 3.0).all() for parameter in stage.parameters())
        return [name for name, _ in stage.named_parameters()]

    first, middle, last = run_ranks(3, rank_main)
    assert [first, middle, last] == asked
    assert {name.split(".")[1] for name in first if "blocks" in name} == {"0"}
    assert {name.split(".")[1] for name in middle} == {"1"}
    assert first[:2] == ["token_embedding.weight", "position_embedding.weight"]
    assert "token_embedding.weight" in last and "norm.weight" in last


@pytest.mark.parametrize("model", ["decoder", "tied"])
@EACH
def test_all_ranks_get_logits_and_norms_as_of_one(algorithm: str, model: str) -> None:
    more = {"norms": LayerNorms("all", 1)}
    reference = train("single", model, 1, more=more)[0]
    assert reference.logits is not None
    for trace in train(algorithm, model, 3, more=more):
        assert trace.logits is not None
        assert torch.allclose(trace.logits, reference.logits, rtol=0, atol=1e-6)
        for found, expected in zip(trace.results, reference.results, strict=True):
            assert found.norms is not None and expected.norms is not None
            for kind in ("gradients", "parameters", "updates"):
                assert found.norms[kind] == pytest.approx(expected.norms[kind], abs=1e-12)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("model", ["decoder", "tied"])
@EACH
def test_a_delay_is_that_of_single(algorithm: str, model: str, staleness: int) -> None:
    keys: dict[str, Any] = {"staleness": staleness, "optimizer": "adamw"}
    reference = train("single", model, 1, **keys)[0]
    for trace in train(algorithm, model, 3, **keys):
        assert trace.losses == pytest.approx(reference.losses, abs=1e-11)
        for name, expected in reference.parameters.items():
            assert torch.allclose(trace.parameters[name], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("model", "precision"), [("tied_recomputed", "float64"), ("tied", "fp16")])
def test_a_pipeline_with_a_delay_is_emptied_only_to_be_saved(model: str, precision: str) -> None:
    reference = train("single", model, 1, staleness=1, precision=precision)[0]
    torch.manual_seed(0)  # as `train` does
    start = DECODERS[model]().to(PRECISIONS[precision].parameters)

    def rank_main(mesh: Mesh) -> tuple[list[int], list[float]]:
        context = worlds.context(mesh, precision, "sgd", 1)
        runner = mp_pipeline(context, schedule="1f1b", micro_batches=4, layers=None, replicas=1)
        runner.place(copy.deepcopy(start))
        assert isinstance(runner, PipelineWithoutFlush)
        opened, losses = [], []
        for step in range(10):
            batch = worlds.sample("language_model", step)
            result = runner.train_step(worlds.share(batch, worlds.plan_of(runner), step))
            losses += [result.loss] if result else []
            opened.append(len(runner.open))
            if step == 5:
                assert len(list(runner.owned())) and not runner.open
        return opened, losses + [result.loss for result in runner.drain()]

    for stage, (opened, losses) in enumerate(run_ranks(3, rank_main)):
        assert opened == [2 - stage] * 10
        assert losses == pytest.approx(
            reference.losses, rel=1e-11 if precision == "float64" else 0.02
        )


def test_the_configuration_counts_micro_batches_as_the_algorithm_does() -> None:
    config = compose(["algorithm=mp_pipeline", "cluster.ranks=3"])
    stages = config.algorithm.stages(3)
    assert stages is not None

    def rank_main(mesh: Mesh) -> int:
        return runner_of("mp_pipeline", mesh).data_coordinates([1.0] * 3).micro_batches

    assert run_ranks(3, rank_main) == [stages.micro_batches] * 3


@pytest.mark.parametrize("micro_batches", [1, 5, 12])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_every_schedule_with_micro_batches_that_do_not_divide(
    schedule: str, micro_batches: int
) -> None:
    reference = train("single", "tied", 1)[0]
    overrides = {"schedule": schedule, "micro_batches": micro_batches}
    for trace in train("mp_pipeline", "tied", 3, overrides=overrides, micro_batch_size=None):
        assert trace.losses == pytest.approx(reference.losses, abs=1e-12)
        for name, expected in reference.parameters.items():
            assert torch.allclose(trace.parameters[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_params"])
@EACH
def test_it_learns_in_half_precision(algorithm: str, precision: str) -> None:
    reference = train("single", "tied", 1, precision=precision)[0]
    for trace in train(algorithm, "tied", 3, precision=precision):
        assert trace.losses == pytest.approx(reference.losses, rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "bf16_params"])
@pytest.mark.parametrize("kind", ["int8", "bf16", "fp16"])
@EACH
def test_hidden_states_travel_in_fewer_bits(algorithm: str, kind: str, precision: str) -> None:
    plain = train(algorithm, "decoder", 3, precision=precision)[0]
    more = {"quantization": Quantization(kind)}
    for trace in train(algorithm, "decoder", 3, precision=precision, more=more):
        assert trace.losses == pytest.approx(plain.losses, rel=0.02)
        assert precision != "float32" or trace.losses != plain.losses, "rounding is there"


# -- checkpoints ----


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("model", ["decoder", "tied"])
@EACH
def test_it_goes_on_to_the_same_bytes(
    tmp_path: Path, algorithm: str, model: str, staleness: int
) -> None:
    keys: dict[str, Any] = {"staleness": staleness, "model": DECODERS[model]}
    whole, hashes = run_part(tmp_path / "a", algorithm, 3, until=STEPS, **keys)
    first, _ = run_part(tmp_path / "b", algorithm, 3, until=4, **keys)
    second, again = run_part(tmp_path / "b", algorithm, 3, until=STEPS, resume=first, **keys)
    assert again == hashes and len(set(hashes)) == 3
    assert same(whole, second)


@pytest.mark.parametrize("staleness", [0, 2])
@EACH
def test_any_other_algorithm_goes_on_from_it_and_it_from_them(
    tmp_path: Path, algorithm: str, staleness: int
) -> None:
    keys: dict[str, Any] = {"staleness": staleness, "model": DECODERS["tied"]}
    whole, _ = run_part(tmp_path / "a", "single", 1, until=STEPS, **keys)
    sharded = {"overrides": {"stage": 2 if staleness else 3}}
    first, _ = run_part(tmp_path / "b", "fsdp", 4, until=2, **keys, **sharded)
    second, _ = run_part(tmp_path / "b", algorithm, 3, until=4, resume=first, **keys)
    third, _ = run_part(tmp_path / "b", algorithm, 2, until=5, resume=second, **keys)
    fourth, _ = run_part(tmp_path / "b", "classicdp", 2, until=7, resume=third, **keys)
    fifth, _ = run_part(tmp_path / "b", algorithm, 1, until=STEPS, resume=fourth, **keys)
    assert worst(whole, fifth) < 1e-11


# -- models of transformers, tied embeddings, random draws ----


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("mistral", {"sliding_window": 4}),
        ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    ],
)
def test_a_model_of_transformers_is_cut_and_read_in_stages(
    tmp_path: Path,
    family: str,
    keys: dict[str, Any],
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_model(tmp_path, family, **keys)
    build_it = lambda: build(Spec(model_folder=str(folder)), **KEYS)  # noqa: E731
    whole = functools.partial(build_model, build_it, 0, dtype=torch.float64, device="cpu")
    monkeypatch.setitem(DECODERS, "hf", whole)
    reference = train("single", "hf", 1, micro_batch_size=3)[0]
    shells = [build_shell(build_it, 0, dtype=torch.float64, device="cpu") for _ in range(2)]

    def rank_main(mesh: Mesh) -> worlds.Trace:
        more = {"first_value": functools.partial(first_value, seed=0)}
        context = dataclasses.replace(worlds.context(mesh, "float64", "sgd", 0), **more)
        keys: dict[str, Any] = {"schedule": "1f1b", "micro_batches": "auto", "layers": None}
        runner = mp_pipeline(context, **keys, replicas=1)
        shells[mesh.rank].recompute = recompute  # type: ignore[assignment]
        runner.place(shells[mesh.rank])
        return worlds.run(runner, "hf", worlds.plan_of(runner), 10)

    traces = run_ranks(2, rank_main)
    found = worlds.joined([piece for trace in traces for piece in trace.pieces])
    assert traces[0].losses == pytest.approx(reference.losses, abs=1e-12)
    assert found.keys() == reference.parameters.keys()
    for name, expected in reference.parameters.items():
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-12)


@EACH
def test_the_owner_of_a_tied_embedding_alone_updates_it(algorithm: str) -> None:
    """Unlike machines round differently; here the last one even has another optimizer."""

    def rank_main(mesh: Mesh) -> list[torch.Tensor]:
        other = functools.partial(make_optimizer, name="adamw", lr=1.0)
        runner = runner_of(algorithm, mesh, **{"make_optimizer": other} if mesh.rank == 2 else {})
        torch.manual_seed(0)
        runner.place(worlds.decoder(tie_embeddings=True).double())
        held = dict(runner.model.named_parameters())
        values = []
        for step in range(3):
            trained(runner, [step])
            runner.wait_for_transfers()
            values += [held[TIED].detach().clone()] if TIED in held else []
        return values

    first, middle, last = run_ranks(3, rank_main)
    assert middle == [] and not torch.equal(first[0], first[1])
    assert all(torch.equal(*pair) for pair in zip(first, last, strict=True))


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("micro_batch", "bad"), [(0, 0), (-1, 1), (1, 2)])
@EACH
def test_a_gradient_that_is_not_finite_is_skipped_and_its_stage_named(
    algorithm: str, micro_batch: int, bad: int, staleness: int
) -> None:
    """Also where it shows in a micro-batch that goes backward in the next step, and only there."""

    def rank_main(mesh: Mesh) -> list[tuple[int, ...]]:
        runner = runner_of(algorithm, mesh, staleness)
        torch.manual_seed(0)
        runner.place(worlds.decoder().double())
        count, calls = len(worlds.plan_of(runner).sizes), [0]

        def hurt(gradient: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return gradient * (torch.inf if calls[0] == count + 1 + micro_batch % count else 1.0)

        for model in (runner.model, *getattr(runner, "_versions", [])) if mesh.rank == bad else ():
            list(model.parameters())[-1].register_hook(hurt)
        return [result.nonfinite_ranks for result in trained(runner, range(4))]

    for found in run_ranks(3, rank_main):
        assert found == [(), (bad,), (), ()]


def noisy() -> torch.nn.Module:
    model = worlds.decoder()

    def drop(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        generator = worlds._of_this_rank.generator
        drawn.setdefault(generator.initial_seed(), []).append(len(output))
        return output * torch.rand(output.shape, generator=generator, dtype=output.dtype)

    for block in model.blocks.values():
        block.feed_forward.register_forward_hook(drop)
    return model


drawn: dict[int, list[int]] = {}


def test_random_draws_follow_from_samples_and_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of micro-batches; no two stages draw the same."""
    monkeypatch.setitem(DECODERS, "noisy", noisy)
    more: dict[str, Any] = {"more": {"reseed": worlds.reseed}, "steps": 3}
    drawn.clear()
    gpipe = train("mp_pipeline", "noisy", 3, overrides={"schedule": "gpipe"}, **more)[0]
    assert len(drawn) == 3 * 12 * 3  # steps, micro-batches of a sample, stages
    for algorithm in SPLIT:
        overrides = {} if algorithm == "mp" else {"schedule": "1f1b"}
        other = train(algorithm, "noisy", 3, overrides=overrides, micro_batch_size=1, **more)[0]
        assert other.losses == gpipe.losses
    assert len(drawn) == 3 * 12 * 3


def partly_frozen() -> torch.nn.Module:
    model = worlds.decoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("token_embedding", "blocks.0")))
    return model


@EACH
def test_frozen_layers_at_the_beginning(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECODERS, "frozen", partly_frozen)
    reference = train("single", "frozen", 1)[0]
    overrides = {"layers": [[0, 1], [2, 2]]}
    for trace in train(algorithm, "frozen", 2, overrides=overrides):
        assert trace.losses == pytest.approx(reference.losses, abs=1e-12)


def counting_decoder() -> torch.nn.Module:
    model = worlds.decoder()
    model.blocks["1"].register_buffer("calls", torch.zeros(()))
    return model


@pytest.mark.parametrize(
    ("make", "refusals"),
    [
        (partly_frozen, ["rank 0 would have nothing to train", "", ""]),
        (counting_decoder, ["", r"buffers \(blocks.1.calls\)", ""]),
    ],
)
@EACH
def test_stages_that_cannot_be_trained_are_refused(
    algorithm: str, make: Callable[[], torch.nn.Module], refusals: list[str]
) -> None:
    def rank_main(mesh: Mesh) -> str:
        try:
            runner_of(algorithm, mesh).place(make())
        except ConfigError as error:
            return str(error)
        return ""

    for found, expected in zip(run_ranks(3, rank_main), refusals, strict=True):
        assert re.search(expected, found) if expected else found == ""


# -- evaluation between steps ----


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("staleness", [0, 1])
@EACH
def test_an_evaluation_between_steps_is_that_of_the_model(
    algorithm: str, staleness: int, quantization: str
) -> None:
    """Also while micro-batches are still open, and in full precision where training is quantized;
    in the memory mesh every send waits for its receiver, as large ones do over TCP."""
    torch.manual_seed(0)
    start = worlds.decoder(tie_embeddings=True).double()
    tokens = worlds.sample("language_model", 0).inputs[:2]

    def rank_main(mesh: Mesh) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        runner = runner_of(algorithm, mesh, staleness, quantization=Quantization(quantization))
        runner.place(copy.deepcopy(start))
        plan = worlds.plan_of(runner)
        for step in range(3):
            batches = worlds.share(worlds.sample("language_model", step), plan, step)
            runner.train_step(batches)
            runner.eval_step(batches)
        logits = runner.logits(tokens)
        state = {name: value.clone() for name, value in runner.model.state_dict().items()}
        runner.drain()
        return logits, state

    found = run_ranks(3, rank_main)
    start.load_state_dict({name: value for _, state in found for name, value in state.items()})
    expected = start(tokens).float()
    for logits, _ in found:
        assert torch.allclose(logits, expected, rtol=0, atol=1e-6)


# -- faults ----


@pytest.mark.parametrize("fault", [{"cut_after": 20_000}, {"silent_after": 20_000}])
@EACH
def test_a_stage_that_is_lost_or_frozen_is_named_by_the_others(
    algorithm: str, fault: dict[str, int]
) -> None:
    others_have_seen_it = threading.Barrier(2)  # else one may see the other leave first

    def rank_main(mesh: Mesh) -> PeerLost:
        runner = runner_of(algorithm, mesh)
        runner.place(worlds.decoder().double())
        plan = worlds.plan_of(runner)
        with pytest.raises(PeerLost) as caught:
            for step in range(1000):
                batch = worlds.sample("language_model", step)
                runner.train_step(worlds.share(batch, plan, step))
        if mesh.rank != 1:
            others_have_seen_it.wait(20)
        return caught.value

    def wrap(rank: int) -> Any:
        return lambda pipe, peer, kind: FaultyPipe(pipe, **fault) if rank == 1 else pipe

    lost = run_ranks(3, rank_main, kind="tcp", wrap=wrap, silence_s=2.0)
    for found in (lost[0], lost[2]):  # rank 1 may be the first to see its link break, and say so
        assert 1 in (found.rank, found.reported_by)
