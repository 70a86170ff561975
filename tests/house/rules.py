"""The rules of the house as plain functions: files or folders in, what breaks the rule out."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MOST_LINES = 500  # one concept a file; beyond this it is usually two
MOST_FUNCTION_LINES = 50
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "handler", "misc"}
# What these do with foreign bytes is run them.
UNSAFE = re.compile(
    r"\b(?:c?pickle|marshal|cloudpickle|dill|shelve)\b|\btorch\.(?:load|save)\(|\byaml\.(?:unsafe_)?load\("
)
HOUSE_KEYS = {"name", "target"}


def long_files(files: Iterable[Path], excused: Mapping[str, str]) -> list[str]:
    """Files over the limit; an excuse that is no longer needed breaks the rule too."""
    lengths = {
        file.as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in files
    }
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    return _judged(long, excused, "lines")


def long_functions(files: Iterable[Path], excused: Mapping[str, str]) -> list[str]:
    """Functions over the limit, their decorators and docstrings included."""
    long = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    long[f"{file.as_posix()}::{node.name}"] = length
    return _judged(long, excused, "lines long")


def _judged(long: Mapping[str, int], excused: Mapping[str, str], words: str) -> list[str]:
    found = [f"{name} is {length} {words}" for name, length in long.items() if name not in excused]
    found += [f"{name} needs its excuse no longer" for name in excused if name not in long]
    return found + [
        f"{name} is excused without a reason" for name, why in excused.items() if not why
    ]


def vague_names(files: Iterable[Path]) -> list[str]:
    """Files and folders whose name says nothing about what lives there."""
    return [
        f"{file.as_posix()}: {word} says nothing"
        for file in files
        for word in (*file.parts[:-1], file.stem)
        if FORBIDDEN_NAMES & set(word.lower().split("_"))
    ]


def unsafe_code(files: Iterable[Path]) -> list[str]:
    """Imports and calls that can run code from data; comments and texts do not count."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
            elif isinstance(node, ast.Call):
                text = f"{ast.unparse(node.func)}("
            else:
                continue
            if UNSAFE.search(text):
                found.append(f"{file.as_posix()}:{node.lineno}: {text.rstrip('(')}")
    return found


def undescribed(files: Iterable[Path]) -> list[str]:
    """YAML files that do not begin with a one-line description (Hydra's own header may precede)."""
    found = []
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines() or [""]
        first = next((line for line in lines if not line.startswith("# @")), "")
        if not re.match(r"# \S.{7,}", first):
            found.append(f"{file.as_posix()}: the first line is no description")
    return found


def star_rule(target: Callable[..., Any], section: Mapping[str, Any]) -> list[str]:
    """Differences between the keyword-only parameters of a target and the keys of its yaml."""
    parameters = inspect.signature(target).parameters.values()
    wanted = {item.name for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY}
    given = set(section) - HOUSE_KEYS
    found = [f"{section.get('name')}: yaml has no key {name}" for name in sorted(wanted - given)]
    found += [f"{section.get('name')}: {name} is no parameter" for name in sorted(given - wanted)]
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters):
        found.append(f"{section.get('name')}: takes any keyword, so wrong ones are never told")
    return found


def lonely_algorithms(algorithms: Path, conf: Path, tests: Path) -> list[str]:
    """Algorithms without a yaml, a test that names them or a `Source:`; yaml files without one."""
    found = []
    words = "\n".join(file.read_text(encoding="utf-8") for file in tests.rglob("test_*.py"))
    files = [
        file
        for file in sorted(algorithms.glob("*.py"))
        if file.stem
        not in (
            *("__init__", "base", "contract"),
            *("saved", "saved_residuals", "saved_shards", "syncps_worker", "edp_worker"),
        )
    ]
    for file in files:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        if not (conf / f"{file.stem}.yaml").is_file():
            found.append(f"{file.stem}: no {file.stem}.yaml")
        if not re.search(rf"\b{file.stem}\b", words):
            found.append(f"{file.stem}: no test names it")
        if "Source:" not in docstring:
            found.append(f"{file.stem}: its docstring has no `Source:`")
    names = {file.stem for file in files}
    if names:
        found += [
            f"{file.name}: no algorithm" for file in conf.glob("*.yaml") if file.stem not in names
        ]
    return found
