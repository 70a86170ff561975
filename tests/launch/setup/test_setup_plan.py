"""What it takes to make a host ready, and which hosts are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smolrun.errors import HostError
from smolrun.launch.setup.blank_host import Blank
from smolrun.launch.setup.setup_plan import Plan, plan

PI = Blank(
    system="linux",
    architecture="aarch64",
    libc="glibc 2.36",
    pythons=[((3, 11), "/usr/bin/python3", True)],
    free=50_000_000_000,
    is_writable=True,
)


def planned(found: Blank, torch: str = "auto") -> Plan | None:
    return plan(
        "pi5",
        found,
        "/w/envs/e",
        torch=torch,
        requirements=["torch>=2.6", "numpy"],
        workdir="/w",
    )


def test_a_host_that_is_ready_has_nothing_to_do_whatever_else_it_lacks():
    assert planned(replace(PI, has_environment=True, free=0)) is None


def test_a_python_that_is_there_is_used():
    found = planned(PI)
    assert found is not None
    assert (found.python, found.version, found.has_pip) == ("/usr/bin/python3", "3.11", True)
    assert found.lines() == [
        "copy uv there (no root, only into its workdir)",
        "make the environment /w/envs/e by /usr/bin/python3",
        "install 2 packages and what they need with the CPU build of torch",
    ]


def test_without_a_fitting_python_uv_fetches_one():
    for pythons in ([], [((3, 9), "/usr/bin/python3", True)], [((3, 12), "/w/envs/old/x", True)]):
        found = planned(replace(PI, pythons=pythons, uv="/usr/bin/uv"))
        assert found is not None
        assert (found.python, found.version, found.brings_uv) == (None, "3.12", False)
        assert found.lines()[0] == "install Python 3.12 by uv, for its user alone"


def test_a_whole_python_comes_before_one_without_pip_and_312_before_others():
    names = {"a": ((3, 12), "/a", False), "b": ((3, 13), "/b", True), "c": ((3, 12), "/c", True)}
    for have, wanted in (("a", "/a"), ("ab", "/b"), ("abc", "/c")):
        found = planned(replace(PI, pythons=[names[one] for one in have]))
        assert found is not None and found.python == wanted


@pytest.mark.parametrize(
    ("found", "torch", "build"),
    [
        (PI, "auto", "cpu"),
        (replace(PI, has_nvidia=True), "auto", "cuda"),
        (replace(PI, has_nvidia=True), "cpu", "cpu"),
        (PI, "cuda", "cuda"),
        (replace(PI, system="darwin"), "auto", "default"),
    ],
)
def test_the_build_of_torch(found: Blank, torch: str, build: str):
    made = planned(found, torch)
    assert made is not None and made.torch == build


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (replace(PI, bits=32), "32-bit"),
        (replace(PI, architecture="armv7l"), "no torch"),
        (replace(PI, system="windows"), "set `python:`"),
        (replace(PI, is_jetson=True), "NVIDIA's own build"),
        (replace(PI, is_writable=False), "set `workdir:`"),
        (replace(PI, free=1_000_000_000), "1.0 GB free"),
        (replace(PI, free=5_000_000_000, has_nvidia=True), "takes 9"),
    ],
)
def test_hosts_that_cannot_be_made_ready(found: Blank, words: str):
    with pytest.raises(HostError, match="pi5: ") as refusal:
        planned(found)
    assert words in str(refusal.value)
