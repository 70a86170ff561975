"""Which libraries hosts may run together, and how a host is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from smolrun.errors import HostError
from smolrun.launch.delivery.versions import (
    ask_versions,
    check_versions,
    env_python,
    environment_name,
    own_dependencies,
    own_versions,
    pythons,
)
from tests.launch.here import HereMachine

DRIVER = {"python": "3.12.4", "smolrun": "0.1.0", "torch": "2.9.1+cpu", "transformers": "5.20.0"}


def check(**changed: str | None) -> Any:
    return check_versions(DRIVER, {"mini1": DRIVER, "pi5": {**DRIVER, **changed}}, cluster="home")


def test_equal_versions_and_other_patches_say_nothing() -> None:
    checked = check(python="3.12.1", torch="2.9.0+cu128", transformers="5.20.1")
    assert (checked.errors, checked.warnings, checked.notes) == ({}, [], [])


@pytest.mark.parametrize(
    ("changed", "what", "hint"),
    [
        ({"smolrun": "0.2.0"}, "it has smolrun 0.2.0, the driver 0.1.0", "cluster.deploy=wheel"),
        (
            {"python": "3.10.2"},
            "its Python is 3.10.2, smolrun needs 3.11",
            "task=setup cluster=home",
        ),
        ({"torch": None}, "its Python has no torch", "smolrun task=setup cluster=home"),
        ({"torch": None, "transformers": None}, "no torch and no transformers", "task=setup"),
    ],
)
def test_what_cannot_work_is_an_error(changed: dict[str, str | None], what: str, hint: str) -> None:
    checked = check(**changed)
    assert list(checked.errors) == ["pi5"]
    assert what in checked.errors["pi5"][0]
    assert hint in checked.errors["pi5"][1]


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_another_minor_version_is_a_warning_with_both_numbers(library: str) -> None:
    checked = check(**{library: "2.7.0"})
    assert checked.errors == {}
    assert checked.warnings == [
        f"pi5 has {library} 2.7.0, the driver {DRIVER[library]}: results may differ by rounding"
    ]


def test_another_python_is_a_note() -> None:
    assert check(python="3.13.0").notes == ["pi5 runs Python 3.13.0, the driver 3.12.4"]


@pytest.fixture
def mini1(tmp_path: Path) -> HereMachine:
    return HereMachine(tmp_path / "mini1")


def test_a_host_tells_its_versions_without_importing_them(mini1: Any, tmp_path: Path) -> None:
    info = tmp_path / "lib" / "smolrun-9.9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smolrun\nVersion: 9.9.9\n")
    (tmp_path / "lib" / "torch.py").write_text("raise SystemExit('imported')")
    python, versions = ask_versions(mini1, "wheel", str(tmp_path / "lib"), cluster="home")
    assert Path(python) == Path(sys.executable)
    assert versions == {**own_versions(), "smolrun": "9.9.9"}


def test_a_host_without_an_environment_names_the_command(mini1: Any) -> None:
    mini1.spec.python = None
    with pytest.raises(HostError) as failed:
        ask_versions(mini1, "wheel", "", cluster="home")
    assert str(failed.value) == (
        "mini1: there is no environment for smolrun there yet; smolrun task=setup cluster=home"
    )


def test_a_python_that_is_not_there_is_named(mini1: Any) -> None:
    mini1.spec.python = "/no/such/python"
    with pytest.raises(HostError, match="there is no Python /no/such/python; correct python:"):
        ask_versions(mini1, "wheel", "", cluster="home")


@pytest.mark.skipif(sys.platform == "win32", reason="a script is no program on Windows")
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("#!/bin/sh\necho broken >&2\nexit 1\n", "ended with 1: broken"),
        ("#!/bin/sh\nexit 4\n", "ended with 4: it said nothing"),
        ("no program", "python cannot be run: "),
    ],
)
def test_a_python_that_does_not_run_says_why(
    mini1: Any, tmp_path: Path, script: str, why: str
) -> None:
    program = tmp_path / "python"
    program.write_text(script)
    program.chmod(0o755)
    mini1.spec.python = str(program)
    with pytest.raises(HostError, match=why):
        ask_versions(mini1, "wheel", "", cluster="home")


def test_which_pythons_may_serve(mini1: Any) -> None:
    assert pythons(mini1, "wheel") == [sys.executable]
    mini1.spec.python = None
    ours = env_python(mini1.workdir, environment_name(own_dependencies()), mini1.os)
    assert pythons(mini1, "wheel") == [ours]
    assert pythons(mini1, "none") == pythons(mini1, "rsync") == [ours, mini1.python]


def test_the_order_of_lines_and_bounds_means_nothing() -> None:
    one = environment_name(["torch>=2.6,<2.14", "numpy >= 2"], "cpu")
    other = environment_name(["numpy>=2", "torch<2.14,>=2.6"], "cpu")
    assert one == other
    assert one.startswith("cpu-")


def test_everything_that_matters_changes_the_name() -> None:
    names = {
        environment_name(lines, torch)
        for lines in (["torch>=2.6"], ["torch>=2.7"], ["torch>=2.6; sys_platform == 'linux'"])
        for torch in ("auto", "cpu", "cuda")
    }
    assert len(names) == 9


def test_our_own_dependencies_have_no_extras() -> None:
    lines = own_dependencies()
    assert not [line for line in lines if line.startswith("matplotlib")]  # no host draws
    assert any(line.startswith("torch") for line in lines)
    assert not any("pytest" in line for line in lines)


def test_each_system_has_its_interpreter() -> None:
    assert (
        env_python("/w", "e", "linux") == env_python("/w", "e", "darwin") == "/w/envs/e/bin/python"
    )
    assert env_python("C:/w", "e", "windows") == "C:/w/envs/e/Scripts/python.exe"
