"""import-linter's contracts hold, and see an import that goes up, aside or past a door."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house.as_installed import ROOT, lay_out

LINTER = shutil.which("lint-imports", path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("as_installed")
    lay_out(ROOT, folder)
    return folder


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    assert LINTER is not None, "import-linter is missing: pip install -e '.[dev]'"
    return subprocess.run(
        [LINTER, "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_tasks_and_conf_are_seen(tree: Path):
    assert (tree / "smolrun" / "tasks" / "__init__.py").is_file()
    assert (tree / "smolrun" / "conf" / "__init__.py").is_file()


# A module, its import, and the contract that it breaks; `make check` shows that all hold without.
VIOLATIONS = [
    ("wire/climbs.py", "import smolrun.mesh", "Imports only go down the floors"),
    ("mesh/climbs.py", "def f():\n    import smolrun.parts", "Imports only go down the floors"),
    ("launch/aside.py", "import smolrun.training", "Imports only go down the floors"),
    ("training/climbs.py", "import smolrun.tasks", "Imports only go down the floors"),
    ("models/climbs.py", "import smolrun.mesh", "Models, data and checkpoints know nothing"),
    ("parts/down.py", "import smolrun.models", "Models, data and checkpoints are used from"),
    ("launch/peeks.py", "import smolrun.config", "see the configuration"),
    ("config/heavy.py", "import torch", "The configuration is instant"),
    ("wire/io.py", "import socket", "The wire decides only"),
    ("tasks/hydra.py", "import omegaconf", "Hydra and OmegaConf"),
    ("training/typed.py", "import pydantic", "pydantic in the configuration"),
    ("launch/net.py", "import socket", "sockets in the mesh"),
    ("parts/late.py", "import threading", "Threads live in"),
    ("training/ssh.py", "import fabric", "Fabric in the SSH launcher"),
    ("training/report.py", "import wandb", "W&B in its tracker"),
    ("training/zoo.py", "import transformers", "transformers and datasets"),
]


@pytest.fixture(scope="module")
def report(tree: Path) -> str:
    """What the linter says of a tree with all violations in it, and of a folder without a floor."""
    for module, line, _ in VIOLATIONS:
        (tree / "smolrun" / module).write_text(line + "\n")
    folder = tree / "smolrun" / "attic"
    folder.mkdir()
    (folder / "__init__.py").touch()
    done = lint(tree)
    assert done.returncode == 1
    return done.stdout


@pytest.mark.parametrize(("module", "contract"), [(m, c) for m, _, c in VIOLATIONS])
def test_violations_are_seen(report: str, module: str, contract: str):
    importer = f" smolrun.{module.removesuffix('.py').replace('/', '.')} -> "
    words = " ".join(report.partition("Broken contracts")[2].split())
    below_its_title = re.escape(contract) + r"[^-]*(-{5,} )+((?!-{5,} ).)*"
    assert re.search(below_its_title + re.escape(importer), words), report


def test_a_new_folder_has_to_be_given_its_floor(report: str):
    assert "attic" in report


def test_every_package_is_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent for path in sorted((ROOT / "smolrun").rglob("__init__.py"))]
    there = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(project["packages"]) == there | {"smolrun.tasks", "smolrun.conf"}
