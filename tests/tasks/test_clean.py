from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from smolrun.tasks import clean
from smolrun.tracking.drivers import note_driver
from smolrun.tracking.past_runs import run_folders
from tests.cli.command import smolrun
from tests.tracking.test_past_runs import a_run, write_steps

NEW, OLD, RUNNING = (f"2026020{day}-142501-{n}-aaaa" for day, n in ((2, "n"), (1, "o"), (3, "r")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs that are over, one with an unfinished checkpoint; two entries in the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        clean.platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name
    )
    for name in (NEW, OLD):
        run = a_run(tmp_path / "outputs", name)
        run.write_summary({"status": "done"})
        write_steps(run, 0, 1)
        (run.checkpoints / "step-00000010").mkdir(parents=True)
        run.become_latest()
    part = tmp_path / "outputs" / NEW / "checkpoints" / "step-00000020.part-dead"
    part.mkdir()
    (part / "rank0-0.safetensors").write_bytes(b"x" * 5000)
    for entry in ("data/text-1", "models/small-1"):
        (tmp_path / "cache" / "smolrun" / entry).mkdir(parents=True)
        (tmp_path / "cache" / "smolrun" / entry / "file").write_bytes(b"x" * 2000)
    return tmp_path


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Someone in a terminal who answers so, and then hits Ctrl-D. The questions come back."""

    def answer(*texts: str) -> list[str]:
        asked: list[str] = []
        rest = list(texts)

        def ask(question: str) -> str:
            asked.append(question)
            if not rest:
                raise EOFError
            return rest.pop(0)

        monkeypatch.setattr("builtins.input", ask)
        monkeypatch.setattr(clean.sys.stdin, "isatty", lambda: True)
        return asked

    return answer


def left(folder: Path) -> list[str]:
    """What is still there of what could go."""
    found = [run.run_id[16] for run in run_folders(folder / "outputs")]
    found += {path.name for path in folder.glob("outputs/*/checkpoints/*.part-*")}
    cached = [path for path in folder.glob("cache/smolrun/*/*") if path.parent.name != "drivers"]
    return sorted(found + [path.name for path in cached])


ALL = sorted(["n", "o", "step-00000020.part-dead", "text-1", "small-1"])


def drive() -> int:
    return clean.drive(None)  # type: ignore[arg-type]


def test_without_a_terminal_it_only_lists(folder: Path):
    done = smolrun(folder, "task=clean", environment={"XDG_CACHE_HOME": str(folder / "cache")})
    assert done.code == 0, done
    assert done.seen == "['import hydra']"
    assert "5 kB  unfinished checkpoint step-00000020.part-dead of" in done.out
    assert f"run {NEW} (done," in done.out
    assert "nothing is deleted without an answer" in done.out
    if sys.platform == "linux":
        assert "2 kB  cached data/text-1" in done.out
    assert left(folder) == ALL


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo terminals")
def test_in_a_real_terminal(folder: Path):
    import pty

    ours, theirs = pty.openpty()
    pid = os.fork()
    if pid == 0:
        os.dup2(theirs, 0)
        command = [sys.executable, "-m", "smolrun.cli", "task=clean"]
        out = os.open(folder / "out.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        os.execve(sys.executable, command, {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")})
    os.close(theirs)
    os.write(ours, b"y\nn\nn\nn\ny\n")
    _, status = os.waitpid(pid, 0)
    os.close(ours)
    assert os.waitstatus_to_exitcode(status) == 0, (folder / "out.txt").read_text()
    assert left(folder) == ["n", "small-1", "text-1"]


def test_nothing_goes_by_default(folder: Path, answers: Callable[..., list[str]]):
    asked = answers("", "n", "no", "nonsense", "")
    assert drive() == 0
    assert len(asked) == 5
    assert left(folder) == ALL


def test_what_is_said_goes(folder: Path, answers: Callable[..., list[str]]):
    asked = answers("n", "y", "n", "n", "Y")
    assert drive() == 0
    assert left(folder) == sorted(["n", "step-00000020.part-dead", "small-1"])
    assert "text-1" in asked[1]
    assert OLD in asked[4]
    assert [path.name for path in folder.glob("**/.deleting-*")] == []


def test_all_is_for_one_list_only(folder: Path, answers: Callable[..., list[str]]):
    asked = answers("n", "all", "n", "n")
    assert drive() == 0
    assert len(asked) == 4
    assert left(folder) == ["n", "o", "step-00000020.part-dead"]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_answers_may_end(
    folder: Path,
    answers: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    end: type[BaseException],
):
    answers("y", "y")
    assert drive() == 130
    assert left(folder) == ["n", "o", "small-1"]
    assert "stopped; 7 kB freed" in capsys.readouterr().out


def test_a_running_run_stays_and_so_does_the_cache(
    folder: Path, answers: Callable[..., list[str]], capsys: pytest.CaptureFixture
):
    running = a_run(folder / "outputs", RUNNING)
    running.write_driver(steps=10)
    (running.checkpoints / "step-00000005.part-t").mkdir(parents=True)
    answers("all", "all")
    assert drive() == 0
    assert left(folder) == sorted(["r", "step-00000005.part-t", "small-1", "text-1"])
    assert f"run {RUNNING}: running, so it stays" in capsys.readouterr().out


def test_what_a_server_of_another_folder_uses_stays_and_nothing_else(
    folder: Path, answers: Callable[..., list[str]], capsys: pytest.CaptureFixture
):
    cache = folder / "cache" / "smolrun"
    (cache / "models" / "large-1").mkdir()
    (cache / "parts" / "aaaa").mkdir(parents=True)
    server = a_run(folder / "elsewhere" / "outputs", RUNNING)
    server.write_driver(steps=0)
    checkpoint = folder / "outputs" / OLD / "checkpoints" / "step-00000010"
    note_driver(server, [checkpoint, cache / "models" / "small-1" / "file", cache / "parts"])
    asked = answers("all", "all", "all")
    assert drive() == 0
    assert left(folder) == ["aaaa", "o", "small-1"]
    assert not [one for one in asked if OLD in one or "small-1" in one or "layers" in one]
    out = capsys.readouterr().out
    stays = re.findall(rf"B  (.*) \(.* old\): {RUNNING} uses it, so it stays\n", out)
    assert stays == ["cached models/small-1", "layers of served models", f"run {OLD}"]
    server.write_summary({"status": "stopped"})
    answers("all", "all")
    assert drive() == 0
    assert left(folder) == []
    assert list((cache / "drivers").iterdir()) == []


def test_a_server_that_starts_while_it_asks_keeps_its_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    server = a_run(folder / "elsewhere" / "outputs", RUNNING)

    def ask(question: str) -> str:
        if "small-1" in question:
            server.write_driver(steps=0)
            note_driver(server, [folder / "cache" / "smolrun" / "models" / "small-1"])
            return "y"
        return "n"

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(clean.sys.stdin, "isatty", lambda: True)
    assert drive() == 0
    assert left(folder) == ALL
    assert f"stays: {RUNNING} uses it" in capsys.readouterr().out


def test_a_training_run_of_another_folder_keeps_all_caches(
    folder: Path, answers: Callable[..., list[str]]
):
    training = a_run(folder / "elsewhere" / "outputs", RUNNING)
    training.write_driver(steps=10)
    note_driver(training)
    answers("all", "all")
    assert drive() == 0
    assert left(folder) == ["small-1", "text-1"]


def test_a_run_that_another_machine_drives_keeps_no_cache_of_this_one(
    folder: Path, answers: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        clean.platformdirs, "user_config_path", lambda name: folder / "config" / name
    )
    a_run(folder / "outputs", RUNNING).write_remote({})
    answers("all", "all", "n", "n")
    assert drive() == 0
    assert left(folder) == ["n", "o", "r"]


def test_a_run_that_starts_again_while_it_asks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run = run_folders(folder / "outputs")[0]

    def ask(question: str) -> str:
        if NEW in question and question.startswith("delete run"):
            run.write_driver(steps=10)
            return "y"
        return "n"

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(clean.sys.stdin, "isatty", lambda: True)
    assert drive() == 0
    assert left(folder) == ALL
    assert "stays: it is running now" in capsys.readouterr().out


@pytest.mark.parametrize("as_text", [False, True])
def test_latest_points_to_a_run_that_is_there(
    folder: Path, answers: Callable[..., list[str]], as_text: bool
):
    latest = folder / "outputs" / "latest"
    if as_text:
        latest.unlink()
        latest.write_text(f"{OLD}\n")
    answers("n", "n", "n", "n", "y")
    drive()
    assert latest.resolve() == folder / "outputs" / NEW
    answers("n", "n", "n", "y")
    drive()
    assert not latest.is_symlink()
    assert not latest.exists()


def test_a_latest_that_is_right_is_left_alone(folder: Path, answers: Callable[..., list[str]]):
    answers("n", "n", "n", "y", "n")
    drive()
    assert os.readlink(folder / "outputs" / "latest") == OLD


def test_links_are_not_followed(folder: Path, answers: Callable[..., list[str]], tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (folder / "outputs" / OLD / "link").symlink_to(precious)
    (folder / "cache" / "smolrun" / "data" / "link").symlink_to(precious)
    answers("all", "all", "all")
    drive()
    assert left(folder) == []
    assert (precious / "file").exists()


def test_what_the_disk_refuses_is_told(
    folder: Path,
    answers: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(clean.shutil, "rmtree", refuse)
    answers("n", "n", "n", "all")
    assert drive() == 0
    told = capsys.readouterr()
    assert "Permission denied" in told.err
    assert told.out.endswith("0 B freed\n")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert [run.run_id for run in run_folders(folder / "outputs")] == []
    rests = [item.path.name for item in clean._unfinished([])]
    assert rests == [f".deleting-{OLD}", f".deleting-{NEW}"]


def test_nothing_to_delete(tmp_path: Path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = smolrun(tmp_path, "task=clean", environment=environment)
    assert (done.code, done.out) == (0, "there is nothing to delete\n")


def test_a_link_leads_no_deletion_out_of_the_run(
    folder: Path, answers: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
):
    """`checkpoints` of the newer run is a link to folders that look like unfinished saves."""
    precious = folder / "precious"
    for name in ("step-00000001.part-x", "step-00000001", "step-00000001.old"):
        (precious / name).mkdir(parents=True)
        (precious / name / "file").write_bytes(b"x")
    checkpoints = folder / "outputs" / NEW / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to(precious, target_is_directory=True)
    asked = answers("all", "all")
    assert drive() == 0
    assert not any("unfinished" in question for question in asked)
    assert run_folders(folder / "outputs") == []
    assert len(list(precious.glob("*/file"))) == 3
    assert str(precious) in capsys.readouterr().err
