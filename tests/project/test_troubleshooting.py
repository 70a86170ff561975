"""docs/troubleshooting.md has no sentence that the code does not say, and all about hosts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "\0"  # a name or a number in a sentence of the code

# What nobody can do anything about, or can see.
EXCUSED = {
    f"{GAP}: {GAP}": "an error that nobody foresaw, as Python calls it",
    f"{GAP} failed: {GAP}": "the same, of a question to this very machine",
    "it was given no address to listen on": "every rank has one",
    f"{GAP}-{GAP} is no range of ports": "the configuration refuses it before",
    f"{GAP} has no program in it": "a broken wheel of uv; pip would refuse it",
    f"{GAP} wrote more than 64 MiB": "a command of ours that says very much",
    "the SSH connection was closed": "by ourselves",
    f"reported an invalid run folder {GAP}": "a host that answers with nonsense",
}


def template(node: ast.AST | None) -> str | None:
    """A string of the code with gaps for what is filled in; None if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values
        )
    if isinstance(node, ast.BinOp):
        left, right = template(node.left), template(node.right)
        return None if left is None else left + (right or GAP)
    return None


def trees() -> list[ast.Module]:
    files = [file for folder in ("smolrun", "tasks") for file in (ROOT / folder).rglob("*.py")]
    return [ast.parse(file.read_text(encoding="utf-8")) for file in files]


TREES = trees()
SENTENCES = {text for tree in TREES for node in ast.walk(tree) if (text := template(node))}


def told_of_hosts() -> Iterator[str]:
    """What HostError and Failed are given as `what`, where it is written out there."""
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", "")
            place = {"HostError": 1, "CommandTimeout": 1, "_CannotUse": 1, "Failed": 0}.get(
                name, 99
            )
            text = template(node.args[place]) if len(node.args) > place else None
            if text is not None:
                yield text


def headings() -> list[str]:
    return re.findall(r"^### `(.+)`$", PAGE, flags=re.MULTILINE)


def says(sentence: str, heading: str) -> bool:
    """Whether a sentence of the code may look like the heading, from its beginning on."""
    pattern = ".*".join(re.escape(piece) for piece in heading.split("..."))
    return re.match(pattern, sentence, flags=re.DOTALL) is not None


def test_every_heading_is_a_sentence() -> None:
    assert len(headings()) >= 60
    assert len(headings()) == len(re.findall("^### ", PAGE, flags=re.MULTILINE))


@pytest.mark.parametrize("heading", headings())
def test_the_code_says_every_heading(heading: str) -> None:
    assert any(says(sentence, heading) for sentence in SENTENCES)


@pytest.mark.parametrize("sentence", sorted(set(told_of_hosts())), ids=repr)
def test_every_sentence_about_a_host_is_there(sentence: str) -> None:
    is_there = any(says(sentence, heading) for heading in headings())
    assert is_there != (sentence in EXCUSED), "in the page, or excused, and not both"


def test_no_excuse_is_out_of_date() -> None:
    assert set(EXCUSED) <= SENTENCES


def test_a_sentence_that_nobody_says_is_seen() -> None:
    assert says(f"no address is found for {GAP} ({GAP})", "no address is found for ... (...)")
    assert not says(f"no address is known for {GAP}", "no address is found for ... (...)")
    assert not any(says(sentence, "the moon is too far for ...") for sentence in SENTENCES)
