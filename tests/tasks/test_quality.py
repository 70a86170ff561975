"""Every algorithm learns as well as one process does: real processes, the same samples, three
seeds, and the spread of the seeds beside it. A table of all figures is printed (pytest -s)."""

from __future__ import annotations

import functools
import statistics
import tempfile
from pathlib import Path

import pytest

from tests.tasks.test_whole_runs import finish, rows, start, summary

SEEDS = (0, 1, 2)
MODELS = {
    "mlp": ["model=mlp", "data=digits", "training.steps=120", "training.global_batch_size=64"],
    "gpt_tiny": [
        "model=gpt_tiny", "data=python_stdlib", "data.max_mb=2", "training.steps=120",
        "training.global_batch_size=16", "training.eval_batches=16",
    ],
}  # fmt: skip
MODELS["moe_tiny"] = ["model=moe_tiny", *MODELS["gpt_tiny"][1:]]
# Late gradients want a lower rate, and then more steps; single gets the same.
LATE_MODELS = {
    "mlp": ["training.steps=2000", "optimizer.lr=3e-4"],
    "gpt_tiny": ["training.steps=300", "optimizer.lr=5e-4"],
}
# How far from single's validation loss, as a share of it.
SYNCHRONOUS, LATE = 0.02, 0.05
VARIANTS = {
    "classicdp": (["algorithm=classicdp"], SYNCHRONOUS),
    "classicdp, K=2": (["algorithm=classicdp", "staleness.bound=2"], LATE),
    "syncps": (["algorithm=syncps"], SYNCHRONOUS),
    "syncps, K=2": (["algorithm=syncps", "staleness.bound=2"], LATE),
    "fsdp stage 1": (["algorithm=fsdp", "algorithm.stage=1"], SYNCHRONOUS),
    "fsdp stage 2": (["algorithm=fsdp", "algorithm.stage=2"], SYNCHRONOUS),
    "fsdp stage 3": (["algorithm=fsdp", "algorithm.stage=3"], SYNCHRONOUS),
    "mp": (["algorithm=mp"], SYNCHRONOUS),
    "mp_pipeline": (["algorithm=mp_pipeline"], SYNCHRONOUS),
    "mp_pipeline, gpipe": (["algorithm=mp_pipeline", "algorithm.schedule=gpipe"], SYNCHRONOUS),
    "ep": (["algorithm=ep"], SYNCHRONOUS),
    "edp": (["algorithm=edp", "algorithm.wait_fraction=1000"], LATE),
    "edp, K=1": (["algorithm=edp", "algorithm.wait_fraction=1000", "staleness.bound=1"], LATE),
}
# With the default a busy machine has older gradients, and so a larger loss. Where each of two
# workers waits for its own push, the gradients of the other that come in between are as many as
# its own on average, whatever the machine does.
MOST_AGE = 1.0
# A staleness_lr_scale would halve the way that the weights go in these steps.
NOT_DAMPED = ("mlp", "algorithm=edp")
CANNOT_BE_CUT = ("mlp", "mp")
WITH_EXPERTS = [("moe_tiny", "ep"), ("moe_tiny", "fsdp stage 3"), ("moe_tiny", "mp_pipeline")]


@functools.cache
def eval_loss(model: str, seed: int, *overrides: str) -> float:
    """The final validation loss of a run with these keys."""
    keys = [*MODELS[model], f"seed={seed}", "checkpoint=none", "training.sample_tokens=0"]
    with tempfile.TemporaryDirectory() as folder:
        code, _, err = finish(start(Path(folder), *keys, *overrides), timeout_s=300)
        assert (code, err) == (0, "")
        if ages := [row["age"] for row in rows(Path(folder), "push")]:
            print(f"{model}: gradients are {statistics.mean(ages):.2f} updates old")
            assert statistics.mean(ages) <= MOST_AGE
        return float(summary(Path(folder))["final_eval_loss"])


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "variant"),
    [
        (model, name)
        for model in ("mlp", "gpt_tiny")
        for name in VARIANTS
        if name != "ep" and (model, name[:2]) != CANNOT_BE_CUT
    ]
    + WITH_EXPERTS,
)
def test_it_learns_as_single_does(model: str, variant: str) -> None:
    overrides, allowed = VARIANTS[variant]
    keys = LATE_MODELS[model] if allowed == LATE else []
    if (model, overrides[0]) == NOT_DAMPED:
        overrides = [*overrides, "algorithm.staleness_lr_scale=none"]
    expected = [eval_loss(model, seed, *keys, "algorithm=single") for seed in SEEDS]
    found = [eval_loss(model, seed, *keys, *overrides, "cluster.ranks=3") for seed in SEEDS]
    spread = (max(expected) - min(expected)) / min(expected)
    worst = max(ours / single - 1 for ours, single in zip(found, expected, strict=True))
    print(
        f"\n{model:9} {variant:16} single {[round(loss, 4) for loss in expected]} "
        f"(spread {spread:.1%}), ours {[round(loss, 4) for loss in found]}, worst {worst:+.2%}"
    )
    assert worst < allowed
