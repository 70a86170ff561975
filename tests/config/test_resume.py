"""Going on: what was typed lies on top of what the run had, and only some keys may differ."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.config import resolved, validate
from smolrun.config.resume import (
    MAY_CHANGE,
    completed,
    differences,
    keep_commit,
    on_top,
    with_current_keys,
)
from smolrun.config.synonyms import RENAMED_KEYS

ROOT = Path(__file__).resolve().parents[2]


def config(*overrides: str) -> dict[str, Any]:
    return resolved(compose(overrides))


def test_only_what_was_typed_comes_from_now() -> None:
    stored = config("model=gpt_small", "optimizer.lr=0.001", "seed=7", "training.steps=900")
    now = config("training.steps=1000", "cluster.ranks=3")
    merged = on_top(stored, now, ["training.steps", "cluster.ranks"])
    assert merged["training"]["steps"] == 1000 and merged["cluster"]["ranks"] == 3
    assert merged["model"] == stored["model"] and merged["seed"] == 7
    assert merged["optimizer"]["lr"] == 0.001
    assert stored["training"]["steps"] == 900, "the stored one is left as it was"
    assert list(differences(stored, merged)) == []


def test_a_key_of_what_was_null() -> None:
    stored = config()
    merged = on_top(stored, config("+cluster.restart.max=2"), ["cluster.restart.max"])
    assert stored["cluster"]["restart"] is None and merged["cluster"]["restart"] == {"max": 2}


def test_a_group_comes_as_a_whole() -> None:
    stored = config("cluster.ranks=4", "checkpoint.every=7")
    merged = on_top(stored, config("checkpoint=best"), ["checkpoint"])
    assert merged["checkpoint"]["every"] == 100 and merged["checkpoint"]["keep_best"]
    assert merged["cluster"]["ranks"] == 4


@pytest.mark.parametrize("typed", [[], ["model=hf", "model.name=me/small"], ["model.revision"]])
def test_a_hub_model_stays_at_the_commit_of_the_run(typed: list[str]) -> None:
    keys = ["model=hf", "model.name=me/small"]
    stored = config(*keys, f"model.revision={'a' * 40}")
    now = config(*keys, "model.revision=main")
    merged = on_top(stored, now, [key.partition("=")[0] for key in typed])
    keep_commit(stored, merged)
    assert merged["model"]["revision"] == "a" * 40
    other = on_top(stored, config(*keys, f"model.revision={'b' * 40}"), ["model.revision"])
    keep_commit(stored, other)
    (line,) = differences(stored, other)
    assert line.startswith("model.revision = bbb")


def test_every_difference_is_told_by_name() -> None:
    stored = config()
    changes = ["seed=1", "model.layers=1", "optimizer.lr=1", "training.grad_clip=9", "data=text"]
    now = config(*changes, "data.path=README.md")
    told = "\n".join(differences(stored, now))
    for key in ("seed = 1", "model.layers = 1", "optimizer.lr = 1", "training.grad_clip = 9"):
        assert f"{key}" in told
    assert "data = text: differs" in told and "allowed: 0" in told


def test_a_group_of_another_name_is_one_line() -> None:
    told = list(differences(config(), config("model=mlp", "optimizer=sgd", "optimizer.lr=1")))
    assert told == [
        "data = digits: differs from the run being resumed; allowed: python_stdlib",
        "model = mlp: differs from the run being resumed; allowed: gpt_tiny",
        "optimizer = sgd: differs from the run being resumed; allowed: adamw",
    ]
    (line,) = differences(config(), config("model.name=mine"))
    assert line.startswith("model.name = mine: differs")


def test_all_that_may_change_exists_and_is_in_the_guide() -> None:
    stored = config("data=hf", "data.path=somewhere")
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for key in MAY_CHANGE:
        group, _, name = key.partition(".")
        assert group in stored and (not name or name in stored[group]), key
        assert f"`{key}`" in guide, key


def test_keys_that_are_not_there_do_no_harm() -> None:
    stored = config()
    assert on_top(stored, stored, ["experiment", "hydra.run.dir", "training.typo"]) == stored


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_keys_of_older_versions_have_their_new_names(old: str) -> None:
    group, _, key = old.rpartition(".")
    new = RENAMED_KEYS[old]
    target = {"target": "smolrun.algorithms.edp:edp"}
    section = {**target, key: 7}
    now = with_current_keys({group: section} if group else section)
    assert (now[group] if group else now) == (
        target if new is None else {**target, new.rpartition(".")[2]: 7}
    )
    assert section[key] == 7, "the stored one is left as it was"


def test_the_keys_of_a_user_are_kept() -> None:
    own = {"algorithm": {"target": "my_code.algorithm:build", "patience": 7}}
    assert with_current_keys(own) == own


def test_a_run_of_an_older_version_is_resumed() -> None:
    keys = ["algorithm=syncps", "cluster.ranks=2", "training.log_norms=all"]
    now = config("algorithm=syncps", "cluster.ranks=2")
    stored = config(*keys, "algorithm.ema_decay=0.5", "training.log_norms_every=3")
    older = copy.deepcopy(stored) | {"run": "latest", "write": False, "format": "text"}
    for task in ("attach", "doctor", "status", "stop", "trust"):
        del older[task]
    for old, new in RENAMED_KEYS.items():
        group, _, key = old.partition(".")
        name = (new or "").rpartition(".")[2]
        if key and name in older[group]:
            older[group][key] = older[group].pop(name)
    assert {"norms", "norms_every"} <= older["training"].keys()
    assert completed(older, now) == stored
    assert validate(completed(older, now)) == validate(stored)


def test_a_new_name_wins_over_an_old_one() -> None:
    stored = {"training": {"norms": "none", "log_norms": "all"}}
    assert with_current_keys(stored) == {"training": {"log_norms": "all"}}
