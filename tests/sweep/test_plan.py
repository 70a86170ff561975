"""The jobs of a grid: order, seeds, and names that tell them apart on every system."""

from __future__ import annotations

import itertools

from smolrun.sweep.plan import plan, title
from smolrun.tracking.sweep_folder import JOB_NAME


def names(*cells: list[str]) -> list[str]:
    return [job.name for job in plan(cells, [], 1)]


def test_a_name_has_what_differs_and_nothing_else():
    cells = [
        [f"algorithm={a}", "training.steps=5", f"cluster={c}"]
        for a in ("fsdp", "edp")
        for c in ("sim/pi3", "local")
    ]
    assert names(*cells) == [
        "algorithm=fsdp,cluster=sim-pi3",
        "algorithm=fsdp,cluster=local",
        "algorithm=edp,cluster=sim-pi3",
        "algorithm=edp,cluster=local",
    ]
    assert plan(cells, [], 1)[0].differs == {"algorithm": "fsdp", "cluster": "sim/pi3"}
    assert title(plan(cells, [], 1)) == "algorithm-cluster"


def test_a_key_that_only_some_cells_have_differs():
    jobs = plan([["optimizer=sgd", "+optimizer.momentum=0"], ["optimizer=adamw"]], [], 1)
    assert jobs[0].name == "optimizer=sgd,optimizer.momentum=0"
    assert jobs[1].name == "optimizer=adamw"


def test_one_job_has_a_name_too():
    assert names(["seed=1"]) == ["job"]
    assert title(plan([["seed=1"]], [], 1)) == "one_job"


def test_names_are_safe_on_every_system_and_unique():
    values = [
        "../../etc",
        "a/b",
        "A/B",
        "a b",
        "'a,b'",
        "[1,2]",
        "ä",
        "",
        "a-b-1",
        "x" * 300,
        "CON",
    ]
    found = names(*([f"data.path={value}"] for value in values))
    assert len({name.lower() for name in found}) == len(values)  # Windows, macOS: no case
    for name in found:
        assert JOB_NAME.fullmatch(name)
        assert len(name) <= 84
        assert not name.endswith(".")


def test_long_names_stay_apart():
    ends = ["1", "2"]
    assert len(set(names(*([f"run_name={'x' * 99}{end}"] for end in ends)))) == 2


def test_equal_jobs_are_numbered():
    assert names(["seed=1"], ["seed=1"]) == ["job-1", "job-2"]
    taken = names(["a=x"], ["a=X"], ["a=x-1"])
    assert len({name.lower() for name in taken}) == 3


def test_typed_seeds_are_repeats():
    cells = [[f"algorithm={a}", f"seed={s}"] for a in ("single", "edp") for s in (3, 4)]
    jobs = plan(cells, [3, 4, 3, 4], 1)
    assert [(job.cell, job.repeat) for job in jobs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [job.name for job in jobs][1:3] == ["algorithm=single,seed=4", "algorithm=edp,seed=3"]


def test_no_name_ends_in_a_dot():
    assert names(["optimizer.lr=1."], ["optimizer.lr=1"]) == [
        "optimizer.lr=1-1",
        "optimizer.lr=1-2",
    ]


def test_repeats_are_paired_and_interleaved():
    cells = [["algorithm=single", "seed=7"], ["algorithm=edp", "seed=7"]]
    jobs = plan(cells, [7, 7], 3)
    assert [(job.repeat, job.cell) for job in jobs] == list(itertools.product(range(3), range(2)))
    assert [job.differs["seed"] for job in jobs] == ["7", "7", "8", "8", "9", "9"]
    assert jobs[3].overrides == ["algorithm=edp", "seed=8"]
    assert jobs[3].name == "algorithm=edp,seed=8"
