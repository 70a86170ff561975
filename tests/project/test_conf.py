"""Every file of conf/ composes, is valid, has a description and exactly its target's keys."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smolrun.cli import choices
from smolrun.cli.compose import compose
from smolrun.config.describe import NOT_BUILT
from tests.project import rules

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
FILES = sorted([*CONF.glob("*/*.yaml"), *CONF.glob("*/*/*.yaml")])
# What a choice needs beside itself.
ALSO = {
    "data/text": ["data.path=README.md"],
    "experiment/my_notes": ["data.path=README.md"],
    "model/mlp": ["data=digits"],
    "model/hf": ["model.name=some/model"],
    "model/trained": ["task=export"],
    "algorithm/ep": ["model=moe_tiny"],
    "data/digits": ["model=mlp"],
    "data/fashion_mnist": ["model=mlp"],
    "data/mnist": ["model=mlp"],
    "data/hf": ["data.path=some/dataset"],
    "data/chat": ["data.path=chats.jsonl"],
}


def names(files: list[Path]) -> list[str]:
    return [file.relative_to(CONF).with_suffix("").as_posix() for file in files]


@pytest.mark.parametrize("name", names(FILES))
def test_every_choice_composes_and_is_valid(name: str):
    overrides = [name.replace("/", "=", 1), *ALSO.get(name, [])]
    assert compose(overrides).task


def test_the_lists_above_name_real_choices():
    assert {*ALSO} <= set(names(FILES))


def test_every_yaml_has_a_description():
    assert rules.undescribed(sorted(CONF.rglob("*.yaml"))) == []


@pytest.mark.parametrize("text", ["x: 1\n", "\n# late\n", "# @package _global_\nx: 1\n", ""])
def test_missing_descriptions_are_found(tmp_path: Path, text: str):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert len(rules.undescribed([file])) == 1


def test_every_group_has_a_default_and_every_default_is_there():
    groups, defaults = choices.groups([CONF]), choices.defaults([CONF])
    assert groups.keys() == defaults.keys()
    assert [f"{g}={c}" for g, c in defaults.items() if c != "null" and c not in groups[g]] == []


def test_what_is_called_not_built_is_not_there():
    groups = choices.groups([CONF])
    there = [f"{g}={c}" for g, later in NOT_BUILT.items() for c in later if c in groups.get(g, ())]
    assert there == []


TARGETS = [
    file
    for group in ("algorithm", "model", "data")
    for file in sorted((CONF / group).glob("*.yaml"))
]


@pytest.mark.parametrize("file", TARGETS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_star_rule(file: Path):
    section = yaml.safe_load(file.read_text())
    section.pop("defaults", None)
    module, _, name = section["target"].partition(":")
    assert rules.star_rule(getattr(importlib.import_module(module), name), section) == []
    assert section["name"] == file.stem


def missing(context: int, *, bucket_mb: float, other: int) -> None: ...


def extra(context: int) -> None: ...


def positional(bucket_mb: float) -> None: ...


def anything(context: int, *, bucket_mb: float, **rest: int) -> None: ...


@pytest.mark.parametrize("target", [missing, extra, positional, anything])
def test_the_star_rule_finds_violations(target: Callable[..., Any]):
    assert rules.star_rule(target, {"name": "x", "target": "y", "bucket_mb": 1.0})


def test_every_algorithm_has_a_test_and_a_source():
    assert rules.incomplete_algorithms(CONF / "algorithm", ROOT / "tests") == []
