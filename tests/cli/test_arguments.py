"""Values that Hydra's grammar cannot read: taken as text where that is clear, else one problem with
the quoted line to type."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from smolrun.cli import arguments, mistakes, run
from smolrun.cli.arguments import (
    Arguments,
    for_hydra,
    readable,
    typed_as_text,
    without_aliases,
)
from smolrun.cli.compose import composing
from smolrun.config import RunConfig
from smolrun.errors import ConfigError

AWKWARD = ["it's.txt", "(", "a(b).txt", 'say "hi", ok', "c:\\a(b)\\", "größe'\\\"x", "a, b = [c"]


def checked(*overrides: str) -> RunConfig:
    found = Arguments(overrides=["data=text", *overrides])
    with composing(found):
        return run.checked(found)


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        checked(*overrides)
    return error.value.problems


def read(override: str) -> object:
    (word,) = for_hydra([override], ())
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("text", ["größe.txt", "a=b.txt", "~x", "a#1;2!.txt", "数 据", "2020&1"])
def test_what_can_only_be_text_is_text(text: str):
    assert read(f"data.path={text}") == text


def test_entries_of_a_list_are_text_too():
    config = checked("data.path=[größe.txt, b c.txt,a=b]")
    assert config.data.keywords()["path"] == ["größe.txt", "b c.txt", "a=b"]


@pytest.mark.parametrize(
    "name", ["5e11", "20260131", "true", "3fa9", "5e11/algorithm=fsdp,seed=1", "s/cluster=sim-pi3"]
)
def test_a_name_of_a_run_is_text(name: str):
    for word in without_aliases([f"model.run={name}", f"checkpoint.resume={name}"]):
        assert read(word) == name


def test_names_of_runs_of_a_sweep():
    (word,) = without_aliases(["model.run=s/seed=1,s/seed=2,5e11"])
    assert word == "model.run=s/seed=1,s/seed=2,'5e11'"
    assert without_aliases(["model.run=glob(*)"]) == ["model.run=glob(*)"]


def test_so_are_the_values_of_a_sweep():
    found = Arguments(["data=text", "data.path=größe.txt,b.txt"], is_sweep=True)
    with composing(found):
        assert [job[-1] for job in run.checked_jobs(found)[0]] == [
            "data.path='größe.txt'",
            "data.path=b.txt",
        ]


@pytest.mark.parametrize("override", ["a=1e3", "a=[1,2]", "a=x,y", "a={b: 1}", "a='ö'", "a=${b}"])
def test_what_hydra_reads_stays_as_it_is(override: str):
    assert readable(override) == override


@pytest.mark.parametrize("text", AWKWARD)
def test_for_other_values_the_line_to_type_is_shown(text: str):
    (line,), sound = mistakes.find([f"data.path={text}"], {}, is_sweep=False)
    (word,) = shlex.split(line.partition(" for one text type ")[2])
    assert read(word) == text
    assert [read(override) for override in sound] == [text]


def test_they_are_one_problem():
    (line,) = problems("data.path=it's.txt")
    assert line.startswith("data.path=it's.txt: cannot be read (")


def test_several_values_without_m_are_one_problem_with_the_line_to_type():
    (line,) = problems("data.path=x", "training.sample_prompt=Once upon a time, there")
    assert line.endswith(
        "several values; add -m to run them all; for one text type "
        "'training.sample_prompt=\"Once upon a time, there\"'"
    )


@pytest.mark.parametrize("override", ["seed=(", "run_name=it's", "data.path=[it's]"])
def test_quotes_are_not_advised_where_they_would_not_help(override: str):
    assert "for one text" not in problems("data.path=x", override)[0]


@pytest.mark.parametrize("text", AWKWARD)
def test_the_shells_of_windows_get_double_quotes(monkeypatch: pytest.MonkeyPatch, text: str):
    with monkeypatch.context() as patched:
        patched.setattr(arguments.os, "name", "nt")
        typed = typed_as_text("data.path", text)
    assert typed[0] == typed[-1] == '"'
    word = typed[1:-1].replace('\\"', '"')
    assert OverridesParser.create().parse_override(word).value() == text


@pytest.mark.parametrize(("typed", "steps"), [("1e3", 1000), ("2000.0", 2000)])
def test_an_integral_float_is_an_integer(typed: str, steps: int):
    config = checked("data.path=x", f"training.steps={typed}")
    assert (config.training.steps, config.training.warmup_steps) == (steps, 100)
    assert type(config.training.steps) is int


def test_no_other_float_is_an_integer():
    (line,) = problems("data.path=x", "training.steps=1.5e0")
    assert line.startswith("training.steps = 1.5: not an integer")


def test_floats_of_own_code_stay_floats():
    config = checked("data.path=x", "model.target=json:loads", "model.ratio=1e3")
    assert type(config.model.keywords()["ratio"]) is float
