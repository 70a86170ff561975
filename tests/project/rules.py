"""The project's own rules as plain functions: files or folders in, a list of violations out."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

MAX_LINES = 500  # one concept a file; beyond this it is usually two
MIN_LINES = 40  # below this it usually belongs to its user
MAX_FUNCTION_LINES = 50
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "handler", "misc"}
# What these do with foreign bytes is run them.
UNSAFE = re.compile(
    r"\b(?:c?pickle|marshal|cloudpickle|dill|shelve)\b|\btorch\.(?:load|save)\(|\byaml\.(?:unsafe_)?load\("
)
RUNNER_KEYS = {"name", "target"}  # of a yaml; its other keys are given to the target
PATH = re.compile(r"(?<![\w./*{}-])(?:[\w-]+/)*[\w-]+\.py\b")


def file_sizes(files: Iterable[Path], *, least: int, exceptions: Mapping[str, str]) -> list[str]:
    """Files of fewer than `least` or more than MAX_LINES lines."""
    found = {}
    for file in files:
        length = len(file.read_text(encoding="utf-8").splitlines())
        if not least <= length <= MAX_LINES and file.name != "__init__.py":
            found[file.as_posix()] = f"has {length} lines"
    return _without(found, exceptions)


def long_functions(files: Iterable[Path], exceptions: Mapping[str, str]) -> list[str]:
    """Functions over the limit, their decorators and docstrings included."""
    found = {}
    for file, node in _nodes(files):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found[f"{file.as_posix()}::{node.name}"] = f"has {length} lines"
    return _without(found, exceptions)


def same_class_names(files: Iterable[Path], exceptions: Mapping[str, str]) -> list[str]:
    """Names that public classes of two files share."""
    places = defaultdict(set)
    for file, node in _nodes(files):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            places[node.name].add(file.as_posix())
    found = {name: f"is in {', '.join(sorted(p))}" for name, p in places.items() if len(p) > 1}
    return _without(found, exceptions)


def _without(found: Mapping[str, str], exceptions: Mapping[str, str]) -> list[str]:
    """Violations without an exception, and exceptions without a violation or a reason."""
    violations = [f"{name} {what}" for name, what in found.items() if name not in exceptions]
    violations += [f"{name}: needless exception" for name in exceptions if name not in found]
    return violations + [f"{name}: no reason" for name, why in exceptions.items() if not why]


def _nodes(files: Iterable[Path]) -> Iterable[tuple[Path, ast.AST]]:
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            yield file, node


def vague_names(files: Iterable[Path]) -> list[str]:
    """Files and folders whose name does not say what is in them."""
    return [
        f"{file.as_posix()}: {word} says nothing"
        for file in files
        for word in (*file.parts[:-1], file.stem)
        if FORBIDDEN_NAMES & set(word.lower().split("_"))
    ]


def unsafe_code(files: Iterable[Path]) -> list[str]:
    """Imports and calls that can run code from data; comments and strings do not count."""
    found = []
    for file, node in _nodes(files):
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = ast.unparse(node)
        elif isinstance(node, ast.Call):
            text = f"{ast.unparse(node.func)}("
        else:
            continue
        if UNSAFE.search(text):
            found.append(f"{file.as_posix()}: {text.rstrip('(')}")
    return found


def stale_paths(files: Iterable[Path], known: Iterable[Path], exceptions: set[str]) -> list[str]:
    """Mentions of Python files (`ring.py`, `collectives/ring.py`) that do not exist."""
    endings = {
        "/".join(file.parts[index:]) for file in known for index in range(len(file.parts))
    } | exceptions
    return [
        f"{file.as_posix()}:{number}: {path}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for path in PATH.findall(line)
        if path not in endings
    ]


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
    given = set(section) - RUNNER_KEYS
    found = [f"{section.get('name')}: yaml has no key {name}" for name in sorted(wanted - given)]
    found += [f"{section.get('name')}: {name} is no parameter" for name in sorted(given - wanted)]
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters):
        found.append(f"{section.get('name')}: takes any keyword, so wrong ones pass")
    return found


def incomplete_algorithms(conf: Path, tests: Path) -> list[str]:
    """Algorithms, by their yaml, without a test that names them or a `Source:` in the docstring of
    their module or its package."""
    found = []
    texts = "\n".join(file.read_text(encoding="utf-8") for file in tests.rglob("test_*.py"))
    for file in sorted(conf.glob("*.yaml")):
        target = yaml.safe_load(file.read_text(encoding="utf-8"))["target"]
        module = target.partition(":")[0]
        docstrings = [
            import_module(name).__doc__ or "" for name in (module, f"{module.rpartition('.')[0]}")
        ]
        if not re.search(rf"\b{file.stem}\b", texts):
            found.append(f"{file.stem}: no test names it")
        if not any("Source:" in docstring for docstring in docstrings):
            found.append(f"{file.stem}: the docstring of {module} has no `Source:`")
    return found
