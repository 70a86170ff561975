"""What a host says of itself in sh, and what is made of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smolrun.launch.setup.blank_host import Blank, question, understood

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
    assert understood(SAID) == Blank(
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
    assert understood("Welcome!\n") == Blank()


@pytest.mark.skipif(os.name != "posix", reason="asks a Unix shell")
def test_this_machine_answers(tmp_path: Path):
    workdir = tmp_path / "not there" / "yet"
    text = question(str(workdir), f"{workdir}/envs/x", [sys.executable, "/nowhere/python3"])
    done = subprocess.run(["sh", "-s"], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = understood(done.stdout)
    assert (found.bits, found.is_writable, found.has_environment) == (64, True, False)
    assert [python[:2] for python in found.pythons] == [(sys.version_info[:2], sys.executable)]
    assert found.free is not None and found.free > 0
    assert not workdir.exists()
