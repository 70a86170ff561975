"""Run a command in a folder laid out as installed: `python as_installed.py mypy -p smolrun`.

tasks/ and conf/ lie at the top of the repository and become smolrun.tasks and smolrun.conf when
installed. Tools that walk folders (mypy, import-linter) see that only where the files lie so.
Copies, not links: Windows has no links for everybody.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lay_out(root: Path, into: Path) -> None:
    """Copy the Python files of `root` to where `package-dir` of its pyproject.toml puts them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    shutil.rmtree(into, ignore_errors=True)
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        for file in sorted((root / folder).rglob("*.py*")):
            if file.suffix in (".py", ".pyi") or file.name == "py.typed":
                copy = into / package.replace(".", "/") / file.relative_to(root / folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
    shutil.copy2(root / "smolrun" / "py.typed", into / "smolrun")
    shutil.copy2(root / "pyproject.toml", into)


def run_in(tree: Path, command: list[str]) -> int:
    """Run a command of this interpreter's environment there, before any installed smolrun."""
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    if program is None:
        sys.exit(f"{command[0]} is not beside {sys.executable}; pip install -e '.[dev]'")
    environment = {**os.environ, "PYTHONPATH": str(tree), "MYPYPATH": str(tree)}
    return subprocess.call([program, *command[1:]], cwd=tree, env=environment)


if __name__ == "__main__":
    lay_out(ROOT, ROOT / "build" / "as_installed")
    sys.exit(run_in(ROOT / "build" / "as_installed", sys.argv[1:]))
