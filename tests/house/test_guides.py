"""The guides about hosts: their cluster files and commands are good, their tables whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from smolrun.config.cluster import Host
from tests.house.guides import DOCS, anchors, cluster_files, commands, write_home

GUIDES = [
    DOCS / f"{name}.md"
    for name in ("cluster", "networks", "troubleshooting", "background", "emulation")
]
FILES = [text for page in GUIDES for text in cluster_files(page)]
COMMANDS = [words for page in GUIDES for words in commands(page)]
DEPLOY = ("none", "rsync", "wheel")  # they have a table of the same form
PAGES = [DOCS.parent / "README.md", DOCS.parent / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("text", FILES, ids=lambda text: text.splitlines()[0])
def test_every_cluster_file_is_good(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_home(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    assert len(compose(["cluster=home"]).cluster.hosts or []) >= 2


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_composes(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_home(tmp_path)
    monkeypatch.chdir(tmp_path)
    compose([word for word in words if not word.startswith("--")])


def test_there_is_something_to_check() -> None:
    assert len(FILES) >= 5
    assert len(COMMANDS) >= 15


def test_every_key_of_a_host_has_its_line() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (DOCS / "cluster.md").read_text(), flags=re.MULTILINE)
    assert sorted(key for key in table if key not in DEPLOY) == sorted(Host.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_a_heading_lead_to_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        there = (page.parent / target) if target else page
        assert anchor in anchors(there), f"{page.name} points to {target}#{anchor}"
