"""What the guides in docs/ show: their commands, their cluster files, their headings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def cluster_files(page: Path) -> list[str]:
    """The yaml blocks of a page that list hosts."""
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if "\nhosts:" in block]


def write_home(folder: Path, text: str | None = None) -> None:
    """Have `cluster=home` in a folder: the first cluster file of the guide, or this one."""
    file = folder / "conf" / "cluster" / "home.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text or cluster_files(DOCS / "cluster.md")[0], encoding="utf-8")


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `smolrun ...` that has a line of its own in a block of code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, flags=re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    words = [re.split(r"\s{2,}", line)[0] for line in lines if line.startswith("smolrun ")]
    return [shlex.split(line)[1:] for line in words]


def anchors(page: Path) -> set[str]:
    """The names under which GitHub lets one point to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}
