from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from smolrun.checkpoints.run_names import locate, named, run_folder, sweep_folder
from smolrun.errors import CheckpointError
from tests.checkpoints.saves import save, tag_of
from tests.checkpoints.test_find import flip, no_warnings


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs: one with two checkpoints, one with one, one with none."""
    monkeypatch.chdir(tmp_path)
    outputs = tmp_path / "outputs"
    save(outputs / "run-a" / "checkpoints", 1)
    save(outputs / "run-a" / "checkpoints", 2)
    save(outputs / "run-b" / "checkpoints", 3)
    (outputs / "run-c").mkdir()
    (outputs / "run-c" / "config.yaml").touch()
    (outputs / "latest").symlink_to("run-a")
    return outputs


@pytest.mark.parametrize("text", ["latest", "run-a", "outputs/run-a", "{outputs}/run-a"])
def test_a_run_means_its_newest_checkpoint(outputs: Path, text: str):
    run, checkpoint = locate(text.format(outputs=outputs), outputs, no_warnings)
    assert run == outputs / "run-a"
    assert tag_of(checkpoint) == 2


@pytest.mark.parametrize("text", ["run-b/checkpoints/step-00000003", "{outputs}/run-b/checkpoints"])
def test_a_checkpoint_can_be_named(outputs: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    if text.endswith("checkpoints"):
        monkeypatch.chdir(outputs / "run-b" / "checkpoints")
        text = "step-00000003"
    run, checkpoint = locate(text, outputs, no_warnings)
    assert (run, tag_of(checkpoint)) == (outputs / "run-b", 3)


def test_latest_as_a_text_file(outputs: Path):
    (outputs / "latest").unlink()
    (outputs / "latest").write_text("run-b\n")
    assert locate("latest", outputs, no_warnings)[0] == outputs / "run-b"


def test_a_checkpoint_outside_a_run(outputs: Path, tmp_path: Path):
    alone = tmp_path / "kept" / "best"
    shutil.copytree(outputs / "run-b" / "checkpoints" / "step-00000003", alone)
    assert locate(str(alone), outputs, no_warnings) == (tmp_path / "kept", alone)


def test_the_newest_of_a_run_may_be_damaged(outputs: Path):
    flip(outputs / "run-a" / "checkpoints" / "step-00000002")
    told: list[str] = []
    assert tag_of(locate("latest", outputs, told.append)[1]) == 1
    assert "step-00000002" in told[0]


def test_a_damaged_one_that_was_named_is_an_error(outputs: Path):
    bad = outputs / "run-a" / "checkpoints" / "step-00000002"
    flip(bad)
    with pytest.raises(CheckpointError, match="is damaged"):
        locate(str(bad), outputs, no_warnings)


FSDP, DDP, EARLIER = (
    "20260131-142501-fsdp-gpt_tiny-3fa9",
    "20260131-142502-classicdp-gpt_tiny-77c0",
    "20260130-090000-fsdp-mlp-12ab",
)
SWEEP = "20260201-090000-algorithm-cluster-5e11"
JOBS = ("algorithm=edp,seed=1", "algorithm=fsdp,seed=1", "algorithm=fsdp,seed=10")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Three runs, and a sweep of three jobs."""
    outputs = tmp_path / "outputs"
    for name in (FSDP, DDP, EARLIER, *(f"sweeps/{SWEEP}/{job}" for job in JOBS)):
        (outputs / name).mkdir(parents=True)
        (outputs / name / "config.yaml").touch()
    (outputs / "sweeps" / SWEEP / "sweep.yaml").touch()
    (outputs / "sweeps" / "latest").symlink_to(SWEEP)
    (outputs / ".deleting-20260131-142503-fsdp-3fa8").mkdir()
    (outputs / "20260131-142504-fsdp-mlp-empty").mkdir()  # not a run
    return outputs


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("3fa9", FSDP),
        ("3FA9", FSDP),
        ("classicdp", DDP),
        ("fsdp-mlp", EARLIER),
        (FSDP, FSDP),
        (f"{SWEEP}/{JOBS[1]}", f"sweeps/{SWEEP}/{JOBS[1]}"),
        (f"5e11/{JOBS[1]}", f"sweeps/{SWEEP}/{JOBS[1]}"),
        ("latest/edp", f"sweeps/{SWEEP}/{JOBS[0]}"),
        ("latest/seed=10", f"sweeps/{SWEEP}/{JOBS[2]}"),
        (f"latest/{JOBS[1]}", f"sweeps/{SWEEP}/{JOBS[1]}"),  # also a part of the next one's name
    ],
)
def test_a_part_that_one_name_has(many: Path, text: str, name: str) -> None:
    assert named(text, many) == (many / name).resolve()


def test_a_name_goes_before_a_part_of_another(many: Path) -> None:
    (many / "fsdp").mkdir()
    (many / "fsdp" / "config.yaml").touch()
    assert named("fsdp", many).name == "fsdp"


def test_a_folder_beside_outputs_that_is_no_run_does_not_hide_a_run(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(many.parent)
    Path("mlp").mkdir()
    assert named("mlp", many).name == EARLIER


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "gpt_tiny",
            f"2 runs have 'gpt_tiny' in their names, type more of one:\n  {DDP}\n  {FSDP}",
        ),
        ("latest/fsdp", f"2 jobs of {SWEEP} have 'fsdp' in their names, type more of one:"),
        ("5e11", f"'5e11' is a sweep, name one of its jobs: {SWEEP}/JOB:\n  {JOBS[2]}"),
        ("latest/mp", f"the sweep {SWEEP} has no job 'mp'; its jobs:\n  {JOBS[2]}\n  {JOBS[1]}"),
        ("nothing/fsdp", "there is no run and no checkpoint 'nothing/fsdp'"),
        ("", f"there is no run and no checkpoint ''; the newest:\n  {DDP}\n"),
        ("sweeps", "sweeps is not the folder of a run"),
        ("latest", "there is no run and no checkpoint 'latest'; the newest:"),
    ],
)
def test_what_is_ambiguous_or_no_run_is_refused_with_those_that_are(
    many: Path, text: str, error: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        named(text, many)
    assert error in str(caught.value)


def test_the_five_newest_are_listed_one_a_line(many: Path) -> None:
    for second in range(10, 19):
        (many / f"20260202-0000{second}-x").mkdir()
        (many / f"20260202-0000{second}-x" / "config.yaml").touch()
    with pytest.raises(CheckpointError) as caught:
        named("zzz", many)
    newest = "".join(f"\n  20260202-0000{second}-x" for second in (18, 17, 16, 15, 14))
    assert str(caught.value) == f"there is no run and no checkpoint 'zzz'; the newest:{newest}"
    (many / "20260203-000000-evil\x1b[2J\nx").mkdir()
    (many / "20260203-000000-evil\x1b[2J\nx" / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=r"20260203-000000-evil \[2J x\n  20260202-000018"):
        named("zzz", many)


def test_a_sweep_by_a_part_of_its_name(many: Path) -> None:
    sweep = (many / "sweeps" / SWEEP).resolve()
    for text in ("latest", "5e11", SWEEP, str(sweep)):
        found = sweep_folder(text, many)
        assert found is not None and found.resolve() == sweep
    for text in ("", "nothing", FSDP):
        assert sweep_folder(text, many) is None
    (sweep.parent / f"{SWEEP[:-4]}5e12").mkdir()
    with pytest.raises(CheckpointError, match="2 sweeps have '5e1' in their names"):
        sweep_folder("5e1", many)


def test_a_path_to_another_folder(many: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(many / FSDP, elsewhere)
    assert run_folder(str(elsewhere), many) == elsewhere.resolve()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run-x", r"no run and no checkpoint 'run-x'; the newest:\n  run-c\n  run-b\n  run-a$"),
        (
            "run-c",
            r"the run run-c has no checkpoint that can be used; the newest with checkpoints:",
        ),
        ("run-a/config.yaml", "no run and no checkpoint"),
        ("~nobody-here/x", "no run and no checkpoint"),
        ("a\0b", "no run and no checkpoint"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(outputs: Path, text: str, problem: str):
    with pytest.raises(CheckpointError, match=problem):
        locate(text, outputs, no_warnings)


def test_without_any_run(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"'latest'; there is no folder .*outputs: are you"):
        locate("latest", tmp_path / "outputs", no_warnings)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(CheckpointError, match=r"'latest'; there are none"):
        locate("latest", tmp_path / "outputs", no_warnings)
