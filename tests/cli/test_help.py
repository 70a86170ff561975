"""`smolrun --help`: complete, instant, narrow enough, and aware of the user's own ./conf."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from smolrun.cli import choices, help
from tests.cli.command import quickest, smolrun

SECONDS = 0.25  # the goal, of a machine with nothing else to do


@pytest.mark.soak
def test_help_is_instant(tmp_path: Path):
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "smolrun.cli", "model=gpt_tiny", "--help"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - began

    assert quickest(seconds, SECONDS) < SECONDS


def test_help_imports_and_starts_nothing(tmp_path: Path):
    assert all(smolrun(tmp_path, flag).seen == "[]" for flag in ("--help", "-h"))


def test_help_names_every_choice_with_its_description():
    shipped = choices.shipped_folder()
    text = help.text(Path("/"))
    for group, names in choices.groups([shipped]).items():
        assert f"\n  {group} " in text
        for name, description in names.items():
            assert f" {name} " in text
            assert description in " ".join(text.split())
    for default in ("* train ", "* local ", "* classicdp ", "* gpt_tiny "):
        assert default in text


def test_help_fits_a_terminal():
    assert max(len(line) for line in help.text(Path("/")).splitlines()) <= 100


def test_help_shows_examples_exit_codes_and_completion():
    text = help.text(Path("/"))
    assert text.count("\n  smolrun ") == 8
    for word in ("130 stopped", "-sc install=bash", "--cfg job", "docs/configuration.md"):
        assert word in text


def test_help_shows_ones_own_choices(tmp_path: Path):
    cluster = tmp_path / "conf" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "home.yaml").write_text("# What stands in my kitchen\nhosts: null\n")
    (cluster / "local.yaml").write_text("# My own way of local\nranks: 3\n")
    text = help.text(tmp_path)
    assert "home               What stands in my kitchen\n" in text
    assert "* local              My own way of local\n" in text
    assert "This machine alone" not in text


def test_help_survives_a_reader_that_leaves(tmp_path: Path):
    command = f"{sys.executable} -m smolrun.cli --help | head -n 1"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("smolrun trains")
    assert done.stderr == ""
