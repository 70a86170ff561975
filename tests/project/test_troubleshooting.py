"""docs/troubleshooting.md has all error messages about hosts, and only messages of the code."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "\0"  # a name or a number in a message of the code

# Messages without a remedy, or that no user sees.
EXCEPTIONS = {
    f"{GAP}: {GAP}": "an unexpected exception, with its class",
    f"{GAP} failed: {GAP}": "the same, of a probe of this machine",
    "it was given no address to listen on": "every rank has one",
    f"{GAP}-{GAP} is no range of ports": "the configuration is refused before",
    f"{GAP} has no program in it": "a broken wheel of uv; pip would refuse it",
    f"{GAP} wrote more than 64 MiB": "a command of ours with too much output",
    "the SSH connection was closed": "by smolrun itself",
    f"reported an invalid run folder {GAP}": "an invalid answer of a host",
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


@functools.cache  # at the first test, not when all tests are collected: it takes seconds
def nodes() -> list[ast.AST]:
    """All of the code."""
    files = [file for folder in ("smolrun", "tasks") for file in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return [node for tree in trees for node in ast.walk(tree)]


@functools.cache
def messages() -> set[str]:
    return {text for node in nodes() if (text := template(node))}


def host_messages() -> Iterator[str]:
    """The literal messages of HostError, Failed and the like."""
    for node in nodes():
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


def matches(message: str, heading: str) -> bool:
    """Whether a message of the code begins like the heading; `...` stands for anything."""
    pattern = ".*".join(re.escape(piece) for piece in heading.split("..."))
    return re.match(pattern, message, flags=re.DOTALL) is not None


def test_every_heading_is_a_message() -> None:
    assert len(headings()) >= 60
    assert len(headings()) == len(re.findall("^### ", PAGE, flags=re.MULTILINE))


@pytest.mark.parametrize("heading", headings())
def test_the_code_has_every_heading(heading: str) -> None:
    assert any(matches(message, heading) for message in messages())


def test_every_message_about_a_host_is_in_the_page_or_an_exception() -> None:
    found = set(host_messages())
    assert len(found) >= 40
    in_page = {one for one in found if any(matches(one, heading) for heading in headings())}
    assert found - in_page == found & set(EXCEPTIONS)


def test_no_exception_is_out_of_date() -> None:
    assert set(EXCEPTIONS) <= messages()


def test_a_message_that_is_not_in_the_code_is_found() -> None:
    assert matches(f"no address is found for {GAP} ({GAP})", "no address is found for ... (...)")
    assert not matches(f"no address is known for {GAP}", "no address is found for ... (...)")
    assert not any(matches(message, "the moon is too far for ...") for message in messages())
