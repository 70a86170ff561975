"""Which key is suggested in place of one that does not exist."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from smolrun.cli import choices
from smolrun.cli.compose import compose
from smolrun.config import RunConfig, problems, resolved, synonyms, validate
from smolrun.errors import ConfigError


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return resolved(compose())


def problem_with(shipped: dict[str, Any], typed: str) -> str:
    """The one line about a key that is set to 1."""
    data = copy.deepcopy(shipped)
    *groups, key = typed.split(".")
    place = data
    for group in groups:
        place = place[group]
    place[key] = 1
    with pytest.raises(ConfigError) as error:
        validate(data)
    (line,) = error.value.problems
    return line


@pytest.mark.parametrize(("old", "new"), synonyms.RENAMED_KEYS.items())
def test_a_key_of_an_earlier_version_is_reported_with_its_new_name(old: str, new: str | None):
    group, _, key = old.rpartition(".")
    choices = {"algorithm": ["syncps", "edp", "classicdp"], "bench": ["stragglers"]}
    lines = [
        problem_with(resolved(compose([f"{group}={choice}", "task=bench"])), old)
        for choice in choices.get(group, [])
    ] or [problem_with(resolved(compose()), old)]
    if new is None:
        assert all(f"{key}=1" in line for line in lines)
    else:
        assert len([line for line in lines if line.endswith(f"; did you mean {new}?")]) == 1
        name = new.rpartition(".")[2]
        assert all(f"{name} is a key of {group}=" in line for line in lines if "mean" not in line)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.stepz", "training.steps"),
        ("training.lr", "optimizer.lr"),
        ("steps", "training.steps"),
        ("algoritm", "algorithm"),
        ("model.widht", "model.width"),
        ("algorithm.bucket_mbs", "algorithm.bucket_mb"),
        ("training.bucket_mb", "algorithm.bucket_mb"),
        ("training.speed", "cluster.hosts[].speed or watch.speed"),
        ("batch_size", "training.global_batch_size or training.micro_batch_size"),
        ("training.batch_size", "training.global_batch_size or training.micro_batch_size"),
        ("learning_rate", "optimizer.lr"),
        ("model.hidden_size", "model.width"),
        ("dtype", "precision"),
        ("data.path", "data=text data.path=1"),
    ],
)
def test_an_unknown_key_is_told_with_the_one_meant(shipped: dict[str, Any], key: str, meant: str):
    line = problem_with(shipped, key)
    assert line.startswith(f"{key} = 1: no such key; allowed: ")
    assert line.endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("algorithm.stage", "algorithm=fsdp"),
        ("algorithm.server_trains", "algorithm=edp, syncps"),
        ("data.train_size", "data=digits"),
        ("model.widths", "model=mlp"),
        ("optimizer.momentum", "optimizer=sgd"),
        ("tracker.project", "tracker=wandb"),
    ],
)
def test_a_key_of_another_choice_is_told_with_it(shipped: dict[str, Any], key: str, choices: str):
    line = problem_with(shipped, key)
    name = key.partition(".")[2]
    assert ": no such key; allowed: " in line
    assert line.endswith(f"; {name} is a key of {choices}")


@pytest.mark.parametrize(
    "key", ["export.path", "training.polyak", "algorithm.nam", "model.targets"]
)
def test_no_key_is_suggested_that_would_not_do(shipped: dict[str, Any], key: str):
    """One of a choice that is not taken, or the one that says what is chosen."""
    line = problem_with(shipped, key)
    assert "did you mean" not in line


def test_hosts_are_written_as_they_are_read(shipped: dict[str, Any]):
    data = copy.deepcopy(shipped)
    data["cluster"]["hosts"] = "mini1"
    with pytest.raises(ConfigError) as error:
        validate(data)
    (line,) = error.value.problems
    (_, typed, _) = line.rpartition("is written as ")[2].split("'")
    hosts = compose([typed, "cluster.ranks=auto"]).cluster.hosts
    assert [(host.name, host.ssh) for host in hosts or []] == [("mini1", "mini1")]


def test_every_synonym_is_a_word_of_ours():
    groups = choices.groups([choices.shipped_folder()])
    known = {*problems.known_keys(), *(name for names in groups.values() for name in names)}
    known |= {*RunConfig.model_fields}
    for word, ours in synonyms.SYNONYMS.items():
        assert word not in groups, word
        assert known.issuperset(name.rpartition(" ")[2] for name in ours), word
    assert known.issuperset(synonyms.KEY_ALIASES.values())
    for group, names in synonyms.CHOICE_ALIASES.items():
        assert groups[group].keys() >= set(names.values())
