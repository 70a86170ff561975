from __future__ import annotations

from pathlib import Path
from typing import Any

from smolrun.comparison.cells import Cell, Repeat, cautions, differing_keys, make_cells
from smolrun.comparison.selection import Job
from tests.comparison.runs import config, job


def cells(tmp_path: Path, *changes: dict[str, Any], **more: Any) -> tuple[list[str], list[Cell]]:
    made = [job(tmp_path / f"run{n}", config(**change), **more) for n, change in enumerate(changes)]
    return make_cells([one for one, _ in made], [run for _, run in made])


def flat(**changes: Any) -> dict[str, str]:
    return {
        f"{group}.{key}" if isinstance(inner, dict) else group: str(value)
        for group, inner in config(**changes).items()
        for key, value in (inner.items() if isinstance(inner, dict) else [("", inner)])
    }


def test_a_key_that_follows_from_a_choice_is_no_difference():
    edp = {**flat(algorithm__name="edp"), "algorithm.min_ranks": "2", "algorithm.bucket_mb": "8"}
    assert differing_keys([flat(), edp]) == ["algorithm.name"]
    other = flat(algorithm__bucket_mb=1.0)  # the same choice with another value
    assert differing_keys([flat(), other, edp]) == ["algorithm.name", "algorithm.bucket_mb"]
    longer = flat(training__steps=40, training__warmup_steps=4)
    assert differing_keys([flat(), longer]) == ["training.steps"]
    assert differing_keys([flat(), {}]) == []  # unknown is no difference


def test_keys_that_do_not_train_are_no_differences():
    other = {**flat(), "run_name": "x", "tracker.kind": "wandb", "checkpoint.resume": "latest"}
    assert differing_keys([flat(), {**other, "training.sample_tokens": "3"}]) == []


def test_runs_that_differ_by_their_seed_are_repeats(tmp_path: Path):
    edp = {"algorithm__name": "edp"}
    keys, found = cells(tmp_path, {}, {"seed": 1}, {**edp, "seed": 1}, {**edp, "seed": 0})
    assert keys == ["algorithm.name"]
    assert [(cell.label, list(cell.runs)) for cell in found] == [
        ("classicdp", [(0, 0), (1, 0)]),
        ("edp", [(0, 0), (1, 0)]),
    ]
    assert found[1].runs[Repeat(0)].name == "run3"  # paired by seed, not by order


def test_runs_with_one_seed_twice_are_no_pairs_of_another_seed(tmp_path: Path):
    _, (cell,) = cells(tmp_path, {}, {}, {"seed": 1})
    assert {str(key): run.name for key, run in cell.runs.items()} == {
        "0": "run0",
        "0 (2)": "run1",
        "1": "run2",
    }


def test_labels_say_the_key_where_the_value_does_not_say_enough(tmp_path: Path):
    int8 = {"quantization__kind": "int8", "optimizer__lr": 0.01}
    _, found = cells(tmp_path, {"optimizer__lr": 0.01}, int8, {"optimizer__lr": 0.1})
    assert [cell.label for cell in found] == [
        "lr=0.01, quantization=none",
        "lr=0.01, int8",
        "lr=0.1, quantization=none",
    ]


def test_a_plan_says_which_jobs_are_repeats(tmp_path: Path):
    made = [job(tmp_path / f"run{n}", config(seed=n // 2))[1] for n in range(4)]
    plan = [({"cluster": "sim/pi3", "seed": "0"}, 0, 0), ({"cluster": "local", "seed": "0"}, 1, 0)]
    plan += [({"cluster": "sim/pi3", "seed": "1"}, 0, 1), ({"cluster": "local", "seed": "1"}, 1, 1)]
    jobs = [Job(run.folder, run.name, *one) for run, one in zip(made, plan, strict=True)]
    keys, found = make_cells(jobs, made)
    assert keys == ["cluster"]
    assert [(cell.label, list(cell.runs)) for cell in found] == [
        ("sim/pi3", [(0, 0), (1, 0)]),
        ("local", [(0, 0), (1, 0)]),
    ]
    assert found[0].runs[Repeat(1)] is made[2]


def test_a_run_without_a_configuration_is_a_row_of_its_own(tmp_path: Path):
    known, lost, other = (job(tmp_path / name) for name in ("a", "b", "c"))
    for _, run in (lost, other):
        run.config = {}
    _, found = make_cells([known[0], lost[0], other[0]], [known[1], lost[1], other[1]])
    assert [cell.label for cell in found] == ["a", "b", "c"]


def test_what_is_unlike_is_said(tmp_path: Path):
    _, found = cells(tmp_path, {}, {"data__name": "shakespeare", "model__name": "mlp"})
    first, second = (next(iter(cell.runs.values())) for cell in found)
    second.version, second.world_size = "0.0.9", 3
    text = " ".join(cautions(found))
    assert "different models (gpt_tiny, mlp)" in text
    assert "different data (python_stdlib, shakespeare): their losses cannot be compared" in text
    assert "different versions of smolrun (0.1.0, 0.0.9)" in text
    assert "different numbers of ranks (2, 3)" in text
    first.state, second.diverged, second.reason = "running", True, "the loss is not a number"
    lines = cautions(found)
    assert "Not in the verdict, as still running: python_stdlib, gpt_tiny." in lines
    assert "Not in the verdict, as diverged (the loss is not a number): shakespeare, mlp." in lines
    assert [len(cell.done) for cell in found] == [0, 0]
