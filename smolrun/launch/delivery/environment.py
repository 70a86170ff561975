"""Where the libraries that a worker needs lie on a host: one venv for each set of them.

    <workdir>/envs/cpu-1f0c2e4d9a77/bin/python

`task=setup` makes it, a run looks for it; both ask here for its name, so they always mean the same
one. Pure: it touches no host.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from importlib.metadata import requires

# The Python that task=setup installs on hosts: torch has wheels of it for every system we know.
PYTHON = "3.12"
_EXTRA = re.compile(r"\bextra\s*==")
_NAME = re.compile(r"[A-Za-z0-9._-]+(?:\[[^\]]*\])?")


def own_dependencies() -> list[str]:
    """The requirement lines of the installed smolrun, without those of its extras."""
    return [line for line in requires("smolrun") or [] if not _EXTRA.search(line)]


def environment_name(dependencies: Iterable[str], torch: str = "auto") -> str:
    """The name of the environment with these requirement lines and this torch build.

    The order of the lines, and of the bounds in a line, means nothing. Which Python it has is the
    host's matter: any that smolrun takes is fine.
    """
    lines = sorted({_plain(line) for line in dependencies})
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{torch}-{digest[:12]}"


def env_python(workdir: str, name: str, os: str) -> str:
    """Its interpreter, on a host of that system (linux, darwin, windows)."""
    program = "Scripts/python.exe" if os == "windows" else "bin/python"
    return f"{workdir}/envs/{name}/{program}"


def _plain(line: str) -> str:
    """A requirement line as every build tool would have to write it: bounds sorted, no spaces."""
    text, _, marker = line.partition(";")
    text = "".join(text.split())
    name = match[0] if (match := _NAME.match(text)) else ""
    bounds = ",".join(sorted(text[len(name) :].strip("()").split(",")))
    return f"{name.lower()}{bounds}" + (f";{' '.join(marker.split())}" if marker else "")
