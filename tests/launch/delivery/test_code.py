"""Code on its way to a host: once, whole, and never in another driver's way."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from smolrun.errors import HostError
from smolrun.launch.delivery.code import Deploy, HostCode, deliver_code
from smolrun.launch.delivery.code_archive import CodeArchive, code_archive
from smolrun.launch.delivery.store import TransferProgress
from tests.launch.here import HereMachine

DAY_S = 86_400


@pytest.fixture
def mini1(tmp_path: Path) -> HereMachine:
    return HereMachine(tmp_path / "mini1")


@pytest.fixture
def archive(tmp_path: Path) -> CodeArchive:
    return edited(tmp_path, "x = 1\n")


def edited(tmp_path: Path, text: str) -> CodeArchive:
    (tmp_path / "my_code.py").write_text(text)
    return code_archive(tmp_path, ["my_code:build"])


def small(text: str) -> CodeArchive:
    return CodeArchive({"lib/a.py": text.encode(), "own/b.py": b""}, text * 16)


def deliver(machine: Any, archive: CodeArchive, deploy: Deploy = "wheel", **keys: Any) -> HostCode:
    return deliver_code(machine, archive, deploy, **keys)


def hidden(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def assert_whole(code: HostCode, archive: CodeArchive) -> None:
    root = Path(code.lib).parent
    for name, data in archive.files.items():
        assert (root / name).read_bytes() == data


@pytest.mark.parametrize("deploy", ["wheel", "rsync"])
def test_it_travels_once(mini1: HereMachine, archive: CodeArchive, deploy: Deploy) -> None:
    told: list[tuple[str, int, int]] = []
    code = deliver(
        mini1, archive, deploy, transfer=TransferProgress("code", lambda *done: told.append(done))
    )
    assert_whole(code, archive)
    assert Path(code.own, "my_code.py").read_text() == "x = 1\n"
    (put,) = mini1.puts
    assert put[1] < 1_500_000
    assert told == [("code", put[1], put[1])]
    assert deliver(mini1, archive, deploy) == code
    assert len(mini1.puts) == 1
    assert len(mini1.calls) == 3, "nothing to do is one question"
    assert not hidden(mini1.workdir)


def test_an_edit_gets_a_folder_of_its_own(tmp_path: Path, mini1: HereMachine) -> None:
    before, after = edited(tmp_path, "x = 1\n"), edited(tmp_path, "x = 2\n")
    one, other = deliver(mini1, before), deliver(mini1, after)
    assert one != other
    assert_whole(one, before)
    assert_whole(other, after)


def test_of_a_tree_only_changed_files_travel_and_lost_ones_go(
    tmp_path: Path, mini1: HereMachine
) -> None:
    (tmp_path / "my_lib").mkdir()
    (tmp_path / "my_lib" / "__init__.py").touch()
    code = deliver(mini1, edited(tmp_path, "import my_lib\n"), "rsync")
    own = Path(code.own)
    (own / "my_lib" / "__pycache__").mkdir()
    (own / "my_lib" / "__pycache__" / "x.pyc").touch()
    (own / "notes.txt").write_text("what the user's code wrote there")
    (Path(mini1.workdir) / "mine.py").write_text("beside the tree")
    after = edited(tmp_path, "x = 2\n")
    assert deliver(mini1, after, "rsync") == code
    assert_whole(code, after)
    assert mini1.puts[1][1] < 1000, "one small file"
    assert sorted(path.name for path in own.iterdir()) == [".smolrun", "my_code.py", "notes.txt"]
    assert (Path(mini1.workdir) / "mine.py").exists()


def test_a_tree_is_mended_whatever_lies_in_the_way(
    tmp_path: Path, mini1: HereMachine, archive: CodeArchive
) -> None:
    code = deliver(mini1, archive, "rsync")
    own = Path(code.own)
    (own / "my_code.py").unlink()
    (own / "my_code.py").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep.py").touch()
    shutil.rmtree(Path(code.lib) / "smolrun" / "wire")
    try:
        (Path(code.lib) / "smolrun" / "wire").symlink_to(outside)
    except OSError:
        (Path(code.lib) / "smolrun" / "wire").touch()
    deliver(mini1, archive, "rsync")
    assert_whole(code, archive)
    assert [path.name for path in outside.iterdir()] == ["keep.py"]


@pytest.mark.parametrize("deploy", ["wheel", "rsync"])
def test_damaged_code_is_replaced(mini1: HereMachine, archive: CodeArchive, deploy: Deploy) -> None:
    file = Path(deliver(mini1, archive, deploy).own, "my_code.py")
    state = file.stat()
    file.write_text("x = 9\n")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as a broken disk would
    assert_whole(deliver(mini1, archive, deploy), archive)


def test_none_needs_nothing(mini1: HereMachine, archive: CodeArchive) -> None:
    assert deliver(mini1, archive, "none") == HostCode("", mini1.home)
    assert (mini1.calls, mini1.puts) == ([], [])


@pytest.mark.parametrize("deploy", ["wheel", "rsync"])
def test_drivers_at_once_do_not_disturb_each_other(
    tmp_path: Path, archive: CodeArchive, deploy: Deploy
) -> None:
    drivers = [HereMachine(tmp_path / "mini1") for _ in range(4)]
    all_looked = threading.Barrier(4)
    for driver in drivers:
        driver.before_put = lambda path: all_looked.wait(timeout=20)
    codes: list[HostCode] = []
    threads = [
        threading.Thread(target=lambda one=one: codes.append(deliver(one, archive, deploy)))
        for one in drivers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(codes)) == 1
    assert len(codes) == 4
    assert_whole(codes[0], archive)
    assert not hidden(str(Path(codes[0].lib).parents[1]))


@pytest.mark.parametrize("deploy", ["wheel", "rsync"])
def test_a_transfer_that_breaks_leaves_nothing(
    mini1: HereMachine, archive: CodeArchive, deploy: Deploy
) -> None:
    def cut(path: str) -> None:
        raise HostError("mini1", "connection lost")

    mini1.before_put = cut
    with pytest.raises(HostError, match="connection lost"):
        deliver(mini1, archive, deploy)
    left = [path for path in Path(mini1.workdir).rglob("*") if path.is_file()]
    assert left == []
    assert not hidden(mini1.workdir)


@pytest.mark.parametrize("deploy", ["wheel", "rsync"])
def test_bytes_that_changed_on_the_way_are_refused(
    mini1: HereMachine, archive: CodeArchive, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = CodeArchive({**archive.files, "own/my_code.py": b"evil"}, archive.digest)
    monkeypatch.setattr(CodeArchive, "pack", lambda self, names=None, pack=other.pack: pack(names))
    with pytest.raises(HostError, match=r"mini1: own/my_code\.py arrived there with other bytes"):
        deliver(mini1, archive, deploy)
    assert not list(Path(mini1.workdir).rglob("my_code.py"))


def test_the_five_newest_stay_and_what_a_run_uses(mini1: HereMachine) -> None:
    code = Path(mini1.workdir) / "code"
    running = f"{mini1.workdir}/runs/r1"
    for number, text in enumerate("abcdefgh"):
        deliver(mini1, small(text), run=running if text == "b" else None)
        past = time.time() - (30 - number) * DAY_S
        os.utime(code / f"{text * 16}.json", (past, past))
    deliver(mini1, small("y"))  # lately used ones stay, however many
    deliver(mini1, small("z"))
    left = sorted(path.name[0] for path in code.iterdir() if path.is_dir())
    assert left == ["b", "f", "g", "h", "y", "z"]
    assert sorted(path.name[0] for path in code.iterdir() if path.is_file()) == left


def test_what_dead_drivers_left_goes_after_a_day(mini1: HereMachine) -> None:
    deliver(mini1, small("a"))
    code = Path(mini1.workdir) / "code"
    past = time.time() - 2 * DAY_S
    for name, when in [(".incoming-old", past), (".incoming-new", time.time())]:
        (code / name).mkdir()
        os.utime(code / name, (when, when))
    dead = Path(mini1.workdir) / "runs" / "dead"
    dead.mkdir(parents=True)
    os.utime(dead, (past - 20 * DAY_S, past - 20 * DAY_S))
    deliver(mini1, small("a"), run=f"{mini1.workdir}/runs/alive")
    assert hidden(str(code)) == [".incoming-new"]
    assert os.listdir(dead.parent) == ["alive"]


@pytest.mark.parametrize("deploy", ["wheel", "rsync"])
def test_a_workdir_that_cannot_be_written_is_told_with_a_way_out(
    tmp_path: Path, mini1: HereMachine, archive: CodeArchive, deploy: Deploy
) -> None:
    (tmp_path / "mini1" / "work").write_text("a file in the way")
    with pytest.raises(HostError) as failed:
        deliver(mini1, archive, deploy)
    assert f"mini1: cannot write to {mini1.workdir}" in str(failed.value)
    assert "set workdir: in the cluster file" in str(failed.value)
