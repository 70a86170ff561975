"""What README tells people to type works, and where it points there is something."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from tests.house.guides import write_home

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[list[str]]:
    """Every `smolrun ...` line of a code block, without what explains it (after two spaces)."""
    blocks = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("smolrun")]
    return [shlex.split(re.split(r"\s{2,}", line)[0])[1:] for line in lines]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_composes(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_home(tmp_path)
    if arguments == ["--help"]:
        return
    jobs = [[]]  # type: list[list[str]]
    for argument in arguments:
        if argument != "-m":
            key, _, value = argument.partition("=")
            values = value.split(",") if "-m" in arguments else [value]
            jobs = [[*job, f"{key}={one}"] for job in jobs for one in values]
    for job in jobs:
        compose(job)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_makefile_has_the_commands_that_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name
