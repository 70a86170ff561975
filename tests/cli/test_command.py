"""`smolrun` as people type it: wrong input ends with exit code 2, one message, nothing started."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from smolrun.cli.run import run
from tests.cli.command import Done, quickest, smolrun

SECONDS = 0.8  # the goal, on a machine that has nothing else to do


def refused(folder: Path, *arguments: str) -> list[str]:
    """The problem lines of a command that must not start anything, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), redirect_stdout(out), redirect_stderr(err):
        code = run(list(arguments))
    assert (code, out.getvalue()) == (2, ""), err.getvalue()
    head, *lines, tail = err.getvalue().splitlines()
    assert head.startswith("smolrun: ")
    assert head.endswith("in the configuration, nothing was started:")
    assert "--help" in tail
    assert list(folder.iterdir()) == []
    return [line.removeprefix("  ") for line in lines]


ALGORITHMS = "classicdp, edp, ep, fsdp, mp, mp_pipeline, single, syncps"


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "algorithm=clasicdp",
            f"algorithm = clasicdp: no such choice; allowed: {ALGORITHMS}; did you mean classicdp?",
        ),
        (
            "algorithm=diloco",
            f"algorithm = diloco: not built yet; allowed: {ALGORITHMS}",
        ),
        (
            "algorithm=gpt_tiny",
            f"allowed: {ALGORITHMS}; did you mean model=gpt_tiny?",
        ),
        (
            "staleness=2",
            "staleness = 2: no such choice; allowed: auto, bounded, strict;"
            " did you mean staleness.bound=2?",
        ),
        ("precision=bfloat16", "precision = bfloat16: no such choice; allowed: "),
        ("precision=bfloat16", "did you mean bf16?"),
        ("model=llama", "did you mean llama32_1b?"),
        ("cluster=4", "did you mean cluster.ranks=4?"),
        ("cluster=pi3", "sim/wifi4; did you mean sim/pi3?"),
        ("cluster=macmini3_t", "sim/wifi4; did you mean sim/macmini3_tb?"),
        ("cluster=home", "sim/wifi4; `smolrun task=init` writes conf/cluster/home.yaml"),
        ("+quantization=8", "quantization = 8: no such choice; allowed: bf16, fp16, int8, none"),
        ("tracker=true", "tracker = true: no such choice; allowed: "),
        ("cluster={a: 1, b: 2}", "cluster = {a: 1, b: 2}: no such choice; allowed: "),
        ("algoritm=single", "did you mean algorithm?"),
        ("sede=1", "did you mean seed?"),
        ("training.step=5", "training.step = 5: no such key; allowed: steps, "),
        ("training.step=5", "did you mean training.steps?"),
        ("+training.step=5", "did you mean training.steps?"),
        ("train", "train: is not of the form key=value; did you mean task=train?"),
        ("training.steps", "is not of the form key=value; did you mean training.steps=...?"),
        ("training.steps=ten", "training.steps = ten: not an integer; allowed: "),
        ("training.steps=[1", "training.steps=[1: cannot be read"),
        ("training.steps=1,2", "training.steps=1,2: several values; add -m to run them all"),
        ("training.steps=${nothing}", "Interpolation key 'nothing' not found"),
        (
            "data=text",
            "data.path: set data.path=FILE or FOLDER, or a list of them",
        ),
        ("traning.steps=5", "traning.steps = 5: no such key; allowed: task, seed, "),
        ("traning.steps=5", "did you mean training.steps?"),
        ("device=cuda", "did you mean cluster.device?"),
        ("bench.sizes=4096", "did you mean 'bench.sizes=[4096]'?"),
        ("--traning.steps=5", "written key=value, without dashes; did you mean traning.steps=5?"),
        ("--config-dir=nowhere", "--config-dir nowhere: there is no such folder"),
        ("--config-name=mine", "mine: Cannot find primary config 'mine'"),
        ("--experimental-rerun=x.pickle", "reads a pickle"),
        ("--exp=x.pickle", "reads a pickle"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, argument: str, line: str):
    found = refused(tmp_path, argument)
    assert len(found) == 1
    assert line in found[0]


def test_a_mistake_loads_nothing_heavy_and_starts_nothing(tmp_path: Path):
    done = smolrun(tmp_path, "algorithm=clasicdp", "seed=-1")
    assert (done.code, done.out, done.seen) == (2, "", "['import hydra']")
    assert "Traceback" not in done.error


def test_mistakes_of_every_sort_come_together(tmp_path: Path):
    found = refused(
        tmp_path,
        "algorithm=clasicdp",
        "train",
        "training.stepz=5",
        "optimizer.lr=fast",
        "cluster.ranks=0",
        "model.heads=3",
        "seed=[1",
    )
    assert [line.split(" ")[0].rstrip(":") for line in found] == [
        "algorithm",
        "train",
        "seed=[1",
        "cluster.ranks",
        "optimizer.lr",
        "training.stepz",
        "model.heads",
    ]


@pytest.mark.soak
@pytest.mark.parametrize("bad", [["algorithm=clasicdp"], ["seed=-1", "optimizer.lr=0", "a=1"]])
def test_mistakes_are_told_at_once(tmp_path: Path, bad: list[str]):
    assert quickest(lambda: smolrun(tmp_path, *bad).wall_s, SECONDS) < SECONDS


def test_an_unfinished_yaml_of_ones_own_is_named(tmp_path: Path):
    file = tmp_path / "conf" / "cluster" / "home.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# Mine\nhosts: [\n")
    done = smolrun(tmp_path, "cluster=home")
    assert done.code == 2
    assert "Traceback" not in done.error
    assert str(file) in done.error


def shown(folder: Path, *arguments: str) -> Done:
    done = smolrun(folder, *arguments)
    assert done.code == 0, done
    assert "Popen" not in done.seen
    return done


def test_cfg_job_shows_the_composition(tmp_path: Path):
    out = shown(tmp_path, "--cfg", "job", "training.steps=7", "precision=bf16").out
    assert "precision: bf16\n" in out
    assert "  steps: 7\n" in out
    assert "hydra" not in out
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_explains_mistakes_too(tmp_path: Path):
    done = smolrun(tmp_path, "--cfg", "job", "data=textt")
    assert done.code == 2
    assert "did you mean text?" in done.error


def test_a_pickle_is_not_even_read_beside_cfg(tmp_path: Path):
    done = smolrun(tmp_path, "--cfg", "job", "--experimental-rerun", "x.pickle")
    assert done.code == 2
    assert "reads a pickle" in done.error


def test_info_and_hydra_help_print(tmp_path: Path):
    assert "pkg://smolrun.conf" in shown(tmp_path, "--info", "searchpath").out
    assert "hydra" in shown(tmp_path, "--hydra-help").out.lower()


def test_showing_survives_a_reader_that_leaves(tmp_path: Path):
    for flag in ("--info", "--cfg job"):
        command = f"{sys.executable} -m smolrun.cli {flag} | head -c 1"
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert (len(done.stdout), done.stderr) == (1, "")


def test_completion_offers_groups_choices_and_keys(tmp_path: Path):
    def offered(line: str) -> list[str]:
        environment = {"COMP_LINE": line}
        return smolrun(tmp_path, "-sc", "query=bash", environment=environment).out.split()

    assert offered("smolrun algorithm=") == [
        "algorithm=classicdp",
        "algorithm=edp",
        "algorithm=ep",
        "algorithm=fsdp",
        "algorithm=mp",
        "algorithm=mp_pipeline",
        "algorithm=single",
        "algorithm=syncps",
    ]
    assert "training.steps=" in offered("smolrun training.")
    assert "smolrun" in shown(tmp_path, "-sc", "install=bash").out


def test_version(tmp_path: Path):
    done = shown(tmp_path, "--version")
    assert done.out.startswith("smolrun 0.")
    assert done.seen == "[]"
