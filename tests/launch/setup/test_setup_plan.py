"""What it takes to make a host ready, and which hosts are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from smolrun.errors import HostError
from smolrun.launch.setup.setup_plan import BlankHost, Plan, parse_blank_host, plan, question

PI = BlankHost(
    system="linux",
    architecture="aarch64",
    libc="glibc 2.36",
    pythons=[((3, 11), "/usr/bin/python3", True)],
    free=50_000_000_000,
    is_writable=True,
)


def plan_environment(found: BlankHost, torch: str = "auto") -> Plan | None:
    return plan(
        "pi5",
        found,
        "/w/envs/e",
        torch=torch,
        requirements=["torch>=2.6", "numpy"],
        workdir="/w",
    )


def test_a_host_that_is_ready_has_nothing_to_do_whatever_else_it_lacks():
    assert plan_environment(replace(PI, has_environment=True, free=0)) is None


def test_a_python_that_is_there_is_used():
    found = plan_environment(PI)
    assert found is not None
    assert (found.python, found.version, found.has_pip) == ("/usr/bin/python3", "3.11", True)
    assert found.lines() == [
        "copy uv there (no root, only into its workdir)",
        "make the environment /w/envs/e by /usr/bin/python3",
        "install 2 packages and what they need with the CPU build of torch",
    ]


def test_without_a_fitting_python_uv_fetches_one():
    for pythons in ([], [((3, 9), "/usr/bin/python3", True)], [((3, 12), "/w/envs/old/x", True)]):
        found = plan_environment(replace(PI, pythons=pythons, uv="/usr/bin/uv"))
        assert found is not None
        assert (found.python, found.version, found.brings_uv) == (None, "3.12", False)
        assert found.lines()[0] == "install Python 3.12 by uv, for its user alone"


def test_a_whole_python_comes_before_one_without_pip_and_312_before_others():
    names = {"a": ((3, 12), "/a", False), "b": ((3, 13), "/b", True), "c": ((3, 12), "/c", True)}
    for have, wanted in (("a", "/a"), ("ab", "/b"), ("abc", "/c")):
        found = plan_environment(replace(PI, pythons=[names[one] for one in have]))
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
def test_the_build_of_torch(found: BlankHost, torch: str, build: str):
    made = plan_environment(found, torch)
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
def test_hosts_that_cannot_be_made_ready(found: BlankHost, words: str):
    with pytest.raises(HostError, match="pi5: ") as refusal:
        plan_environment(found)
    assert words in str(refusal.value)


SAID = """\
Welcome to pi5!
smolrun-blank nonsense
smolrun-blank system Linux aarch64 64
smolrun-blank libc glibc 2.36
smolrun-blank uv /home/pi/.local/bin/uv
smolrun-blank python bare 3.11.2 /usr/bin/python3
smolrun-blank python whole 3.12.4 /opt/my pythons/bin/python3
smolrun-blank jetson yes
smolrun-blank free 2048
smolrun-blank writable /home/pi
smolrun-blank environment yes
"""


def test_the_answer_is_found_among_noise():
    assert parse_blank_host(SAID) == BlankHost(
        system="linux",
        architecture="aarch64",
        bits=64,
        libc="glibc 2.36",
        uv="/home/pi/.local/bin/uv",
        pythons=[
            ((3, 11), "/usr/bin/python3", False),
            ((3, 12), "/opt/my pythons/bin/python3", True),
        ],
        is_jetson=True,
        free=2048 * 1024,
        is_writable=True,
        has_environment=True,
    )
    assert parse_blank_host("Welcome!\n") == BlankHost()


@pytest.mark.skipif(os.name != "posix", reason="asks a Unix shell")
def test_this_machine_answers(tmp_path: Path):
    workdir = tmp_path / "not there" / "yet"
    text = question(str(workdir), f"{workdir}/envs/x", [sys.executable, "/nowhere/python3"])
    done = subprocess.run(["sh", "-s"], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = parse_blank_host(done.stdout)
    assert (found.bits, found.is_writable, found.has_environment) == (64, True, False)
    assert [python[:2] for python in found.pythons] == [(sys.version_info[:2], sys.executable)]
    assert found.free is not None and found.free > 0
    assert not workdir.exists()
