"""The training loop with its callbacks: events, evaluation, stopping, and errors that end a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.algorithms.base import StepResult
from smolrun.algorithms.classicdp import ClassicDP
from smolrun.data.digits import Digits
from smolrun.data.prepared import Prepared
from smolrun.data.splits import Batch, open_split
from smolrun.errors import CheckpointError, TrainingError
from smolrun.events import Drift, EvalDone, Event, RankStep, ReplicaHash, StepDone
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks
from smolrun.training.evaluation import Evaluation, generate
from smolrun.training.step_metrics import StepMetrics, TerminateOnNonfinite
from smolrun.training.trainer import Callback, Trainer, TrainOutcome
from smolrun.worker.train import place_algorithm, train


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    cache: Path = tmp_path_factory.mktemp("cache")
    return Digits(cache, train_size=400, eval_size=90, noise=0.2, seed=0).prepare(lambda *_: None)


def config(algorithm: str = "classicdp", **training: Any) -> dict[str, Any]:
    algorithms = {
        "single": {"name": "single", "target": "smolrun.algorithms.single:Single"},
        "classicdp": {
            "name": "classicdp",
            "target": "smolrun.algorithms.classicdp:classicdp",
            "bucket_mb": 0.05,
            "shard_optimizer": "auto",
        },
    }
    defaults = {
        "steps": 12,
        "global_batch_size": 20,
        "micro_batch_size": "auto",
        "eval_every": 5,
        "eval_batches": None,
        "grad_clip": 1.0,
        "warmup_steps": 3,
        "lr_schedule": "cosine",
        "min_lr_ratio": 0.1,
        "check_replicas": False,
        "sample_tokens": 0,
        "sample_prompt": "",
        "recompute": False,
        "log_norms": "none",
        "log_norms_every": 10,
        "resync_every": "auto",
    }
    return {
        "seed": 0,
        "precision": "float32",
        "algorithm": algorithms[algorithm],
        "model": {
            "name": "mlp",
            "target": "smolrun.models.mlp:build",
            "widths": [24],
            "activation": "relu",
        },
        "staleness": {"bound": training.pop("staleness", "auto")},
        "quantization": {"kind": "none"},
        "tracker": {"kind": "jsonl", "timeline_steps": training.pop("timeline_steps", 0)},
        "optimizer": {
            "name": "adamw",
            "lr": 3e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
        },
        "training": {**defaults, **training},
    }


def run(
    prepared: Prepared, world_size: int, settings: dict[str, Any], stop_at: int | None = None
) -> list[tuple[dict[str, Any], list[Event]]]:
    """Trains on `world_size` ranks; rank 1 requests a stop after step `stop_at`."""

    def rank_main(mesh: Mesh) -> tuple[dict[str, Any], list[Event]]:
        events: list[Event] = []

        def should_stop() -> bool:
            return (
                stop_at is not None
                and mesh.rank == 1
                and any(isinstance(e, StepDone) and e.step >= stop_at for e in events)
            )

        summary = train(
            settings,
            prepared,
            mesh,
            device="cpu",
            speeds=[1.0] * world_size,
            emit=events.append,
            should_stop=should_stop,
        )
        return summary, events

    return run_ranks(world_size, rank_main, kind="tcp")


def of(kind: type[Event], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_every_step_and_evaluation_is_reported(prepared: Prepared) -> None:
    for summary, events in run(prepared, 2, config(check_replicas=True)):
        assert [event.step for event in of(StepDone, events)] == list(range(12))
        assert [event.step for event in of(EvalDone, events)] == [4, 9, 11]
        assert len(of(RankStep, events)) == 12
        assert all(
            len(set(event.hashes)) == 1 and len(event.hashes) == 2
            for event in of(ReplicaHash, events)
        )
        assert of(StepDone, events)[-1].loss < of(StepDone, events)[0].loss
        assert summary["final_eval_loss"] == of(EvalDone, events)[-1].loss
        assert all(event.tokens == 20 and event.bytes_sent > 0 for event in of(StepDone, events))
        assert all(event.memory_bytes for event in of(RankStep, events))


def test_replicas_that_differ_end_the_run_with_the_name_of_the_tensor(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replica(self: ClassicDP) -> dict[str, torch.Tensor]:
        return {"body": torch.ones(2), "head": torch.tensor(self.context.mesh.rank)}

    monkeypatch.setattr(ClassicDP, "replica_tensors", replica)
    with pytest.raises(TrainingError, match="after step 0 in head:"):
        run(prepared, 2, config(check_replicas=True))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_losses_of_1_to_4_ranks_agree_over_50_steps(
    prepared: Prepared, precision: str, tolerance: float
) -> None:
    losses = []
    for world_size in (1, 2, 3, 4):
        settings = config("single" if world_size == 1 else "classicdp", steps=50, eval_every=0) | {
            "precision": precision
        }
        losses.append(
            [event.loss for event in of(StepDone, run(prepared, world_size, settings)[0][1])]
        )
    assert all(len(trace) == 50 for trace in losses)
    worst = max(abs(a - b) for trace in losses for a, b in zip(trace, losses[0], strict=True))
    assert worst <= tolerance


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_stop_on_one_rank_stops_all_at_the_same_step(prepared: Prepared, staleness: int) -> None:
    outcomes = run(prepared, 3, config(steps=10_000, staleness=staleness), stop_at=6)
    assert len({summary["steps"] for summary, _ in outcomes}) == 1
    assert all(summary["was_stopped"] and summary["steps"] < 100 for summary, _ in outcomes)


@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_a_run_ends_after_20_nonfinite_gradients_in_a_row(
    prepared: Prepared, precision: str
) -> None:
    broken = {"precision": precision, "optimizer": {"name": "sgd", "lr": math.inf}}
    with pytest.raises(TrainingError) as error:
        run(prepared, 1, config("single", steps=40) | broken)
    message = str(error.value)
    assert message.startswith(
        "20 steps in a row had a gradient that is not a number, last of rank 0 at step "
    )
    assert ("float32" in message) == (precision == "bf16")


def test_generated_text_is_the_same_on_all_ranks_and_stays_within_the_context() -> None:
    seen: list[int] = []

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.shape[1])
        return torch.arange(50.0).expand(1, tokens.shape[1], 50)

    first = generate(logits, [1, 2], 20, context_length=8, seed=3)
    assert first == generate(logits, [1, 2], 20, context_length=8, seed=3)
    assert len(first) == 20 and max(seen) == 8 and all(10 <= token < 50 for token in first)


def test_replicas_are_made_equal_every_so_many_updates(prepared: Prepared) -> None:
    for settings, steps in ((config(resync_every=5), [4, 9]), (config(), [])):
        for _, events in run(prepared, 2, settings):
            assert of(Drift, events) == [Drift(step, 0.0, []) for step in steps]


# As checkpoints have it since the first version; `balance` only where shares are measured.
SAVED = {
    "time_s": 12.5,
    "steps": 7,
    "train_loss": 0.5,
    "eval_loss": 0.75,
    "evaluated_at": 5,
    "skipped_in_a_row": 2,
    "balance": None,
}


def trainer_of(mesh: Mesh, prepared: Prepared, log: list[str]) -> Trainer:
    """A trainer of 5 steps, stopped after update 0; its last callback logs its calls."""

    class Log(Callback):
        def before_training(self) -> None:
            log.append("before_training")

        def before_step(self, step: int) -> None:
            log.append(f"before_step {step}")

        def after_update(self, result: StepResult) -> None:
            log.append(f"after_update {result.step}")

        def after_training(self, outcome: TrainOutcome) -> None:
            log.append(f"after_training {outcome.steps} {outcome.final_eval_loss}")

    algorithm = place_algorithm(config("single", staleness=1), prepared, mesh, torch.device("cpu"))
    batch = open_split(prepared, "train", verify=False).batch(range(4))

    class Loader:
        def load(self, step: int, part: object = None) -> list[Batch]:
            return [batch]

    return Trainer(
        algorithm,
        Loader(),
        steps=5,
        callbacks=[
            StepMetrics(algorithm, lambda event: None),
            TerminateOnNonfinite(algorithm, lambda event: None),
            Evaluation(algorithm, list, 0, lambda event: None),
            Log(),
        ],
        should_stop=lambda: "after_update 0" in log,
    )


def test_the_training_state_of_a_checkpoint_keeps_its_keys(prepared: Prepared) -> None:
    def rank_main(mesh: Mesh) -> dict[str, Any]:
        trainer = trainer_of(mesh, prepared, [])
        trainer.restore(SAVED)
        return trainer.state()

    (state,) = run_ranks(1, rank_main)
    assert state.pop("time_s") >= SAVED["time_s"]
    assert state == {key: SAVED[key] for key in SAVED if key not in ("time_s", "balance")}


@pytest.mark.parametrize("state", [{}, SAVED | {"steps": "x"}, SAVED | {"evaluated_at": None}])
def test_a_training_state_that_does_not_fit_is_refused(
    prepared: Prepared, state: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="state of training"):
        run_ranks(1, lambda mesh: trainer_of(mesh, prepared, []).restore(state))


def test_callbacks_are_called_in_order_and_pending_updates_are_drained_on_a_stop(
    prepared: Prepared,
) -> None:
    log: list[str] = []
    run_ranks(1, lambda mesh: trainer_of(mesh, prepared, log).fit())
    assert log == [
        "before_training",
        *("before_step 0", "before_step 1", "after_update 0"),
        *("before_step 2", "after_update 1", "before_step 3", "after_update 2"),
        *("after_update 3", "after_training 4 None"),
    ]
