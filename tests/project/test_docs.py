"""README, SECURITY and docs/: links lead somewhere, commands and cluster files are valid, tables
are complete, and what is made from the code is up to date."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.config.cluster import HostConfig
from smolrun.testing import run_ranks

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = ("cluster", "networks", "troubleshooting", "background", "emulation", "sweeps")
DEPLOY = ("none", "rsync", "wheel")  # they have a table of the same form


def cluster_files(page: Path) -> list[str]:
    """The yaml blocks of a page that list hosts."""
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if "\nhosts:" in block]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `smolrun ...` that has a line of its own in a block of code; an
    explanation may follow after two spaces."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, flags=re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    words = [re.split(r"\s{2,}", line)[0] for line in lines if re.match(r"smolrun\b(?!/)", line)]
    return [shlex.split(line)[1:] for line in words]


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def jobs(arguments: list[str]) -> Iterator[list[str]]:
    """Every combination of the choices of a sweep (-m); without one, the arguments themselves."""
    if "-m" not in arguments:
        yield [argument for argument in arguments if not argument.startswith("--")]
        return
    found: list[list[str]] = [[]]
    for argument in (argument for argument in arguments if argument != "-m"):
        key, _, value = argument.partition("=")
        found = [[*job, f"{key}={one}"] for job in found for one in value.split(",")]
    yield from found


CLUSTER_FILES = [text for name in GUIDES for text in cluster_files(DOCS / f"{name}.md")]
COMMANDS = [
    arguments
    for page in (README, *(DOCS / f"{name}.md" for name in GUIDES))
    for arguments in commands(page)
]


@pytest.fixture
def with_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of `cluster=home` in the working directory: the first one of docs/cluster.md."""
    file = tmp_path / "conf" / "cluster" / "home.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CLUSTER_FILES[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


@pytest.mark.parametrize("text", CLUSTER_FILES, ids=lambda text: text.splitlines()[0])
def test_every_cluster_file_is_valid(text: str, with_home: Path) -> None:
    with_home.write_text(text, encoding="utf-8")
    assert len(compose(["cluster=home"]).cluster.hosts or []) >= 2


@pytest.mark.usefixtures("with_home")
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_composes(arguments: list[str]) -> None:
    for job in jobs(arguments):
        # The model of a run that is there takes the place of `model.run=` in training.
        is_trained = not any(word.startswith("task=") for word in job)
        compose([word for word in job if not (is_trained and word.startswith("model.run="))])


def test_commands_and_cluster_files_are_found() -> None:
    assert len(CLUSTER_FILES) >= 5
    assert len(commands(README)) >= 8
    assert len(COMMANDS) >= 25


def test_every_key_of_a_host_has_its_line() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (DOCS / "cluster.md").read_text(), flags=re.MULTILINE)
    assert sorted(key for key in table if key not in DEPLOY) == sorted(HostConfig.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def test_the_makefile_has_the_commands_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in set(re.findall(r"`?make ([a-z]+)", README.read_text(encoding="utf-8"))):
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name


def test_the_example_of_a_task_runs_on_ranks() -> None:
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    task: dict[str, Any] = {}
    exec(code, task)
    summaries = run_ranks(2, lambda mesh: task["work"](None, mesh, None, repeats=2))
    assert all(summary["barrier_s"] > 0 for summary in summaries)


def test_diagrams_and_tables_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DOCS / "pictures.py", tmp_path], check=True)
    for page in tmp_path.rglob("*.md"):
        name = page.relative_to(tmp_path)
        shipped = (DOCS / name).read_text(encoding="utf-8")
        assert shipped == page.read_text(encoding="utf-8"), f"docs/{name}: run `make docs`"
