"""docs/own_code.md is true: its very files run; and code that breaks is told with its place."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smolrun.errors import ConfigError
from smolrun.targets import load_target
from tests.tasks.test_whole_runs import finish, rows, start, summary

PAGE = (Path(__file__).parents[2] / "docs" / "own_code.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
)
COMMAND, OWN_LOSS = re.findall(r"^```\nsmolrun (.*?)\n```", PAGE, flags=re.MULTILINE)


def write_files(folder: Path) -> None:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_the_page_shows_short_files() -> None:
    example = ["my_code.py", "conf/model/my_net.yaml", "conf/data/spirals.yaml"]
    assert list(FILES) == [*example, "my_loss.py"]
    lines = [line for line in FILES["my_code.py"].splitlines() if line.strip()]
    assert len(lines) <= 22


def test_the_pages_example_learns_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing of an older page
    code, out, err = finish(start(tmp_path, *shlex.split(COMMAND), "training.check_replicas=true"))
    assert code == 0, err
    assert summary(tmp_path)["world_size"] == 2
    assert summary(tmp_path)["final_eval_loss"] < 0.3, "a guess has 1.1"
    assert all(len(set(row["hashes"])) == 1 for row in rows(tmp_path, "replica_hash"))
    assert "spirals: 4,000 train and 500 eval" in out
    loaded = (
        "import smolrun, torch; model, tokenizer = smolrun.load(); print(model(torch.ones(1, 2)))"
    )
    exported = export(tmp_path) + "import torch; print(model(torch.ones(1, 2)))"
    assert python(tmp_path, loaded) == python(tmp_path, exported) != ""


def export(folder: Path) -> str:
    """The lines of the README of the exported model, which read its file in that folder."""
    code, _, err = finish(start(folder, "task=export", "export.out=exported"))
    assert code == 0, err
    card = (folder / "exported" / "README.md").read_text()
    (lines,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 5
    shutil.copy(folder / "exported" / "model.safetensors", folder)
    return str(lines)


def python(folder: Path, code: str) -> str:
    """What Python prints in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.soak
def test_the_pages_loss_is_learnt(tmp_path: Path) -> None:
    write_files(tmp_path)
    words = [*shlex.split(OWN_LOSS), "algorithm=single", "training.steps=60"]
    code, _, err = finish(start(tmp_path, *words))
    assert code == 0, err
    assert 1.6 < rows(tmp_path, "step")[0]["loss"] < 2.1, "cross entropy has 2.3 or more"
    assert summary(tmp_path)["final_eval_loss"] < 1.2


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("x = 1\n\nimport no_such_library\n", 3, "ModuleNotFoundError: No module named"),
        ("def f():\n    return 1 / 0\n\nf()\n", 2, "ZeroDivisionError: division by zero"),
        ("def build(spec:\n    pass\n", 1, "SyntaxError: "),
        ("import sys\nsys.exit('no licence')\n", 2, "SystemExit: no licence"),
    ],
)
def test_code_that_raises_on_import_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, what: str
) -> None:
    name = f"raises_on_import_{abs(hash(text))}"
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as error:
        load_target(f"{name}:build")
    assert f"{path}:{line}" in str(error.value)
    assert what in str(error.value)


def test_nothing_starts_with_code_that_raises(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text("import torch\nraise RuntimeError('not on Sundays')\n")
    code, _, err = finish(start(tmp_path, "model.target=my_net:build", "data=digits"))
    assert code == 2
    assert f"{tmp_path / 'my_net.py'}:2" in err
    assert "RuntimeError: not on Sundays" in err
    assert not (tmp_path / "outputs").exists()


# Whichever worker comes first finds the file and takes it: it is the host that lacks a package.
ON_ONE_HOST = """
import os
import sys
from torch import nn

if "--worker" in sys.argv:
    try:
        os.rename("lacking", "taken")
    except OSError:
        pass
    else:
        import a_package_of_another_host


def build(spec):
    return nn.Linear(784, 10)
"""


@pytest.mark.soak
def test_code_that_raises_on_one_host_only_ends_the_run_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(ON_ONE_HOST)
    (tmp_path / "lacking").touch()
    code, _, err = finish(start(tmp_path, "model.target=my_net:build", "data=digits"))
    assert code == 3
    assert (tmp_path / "taken").exists()
    (run,) = (tmp_path / "outputs").glob("*/summary.json")  # no step, so not the latest run
    told = json.loads(run.read_text())
    assert told["status"] == "failed"
    assert told["failed_rank"] in (0, 1)
    assert f"rank {told['failed_rank']} on {told['failed_host']} failed" in err
    assert "No module named 'a_package_of_another_host'" in told["reason"]
    assert f"{tmp_path / 'my_net.py'}:12" in told["reason"]
