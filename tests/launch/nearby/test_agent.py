"""The agent of a joined machine and the coordinator's Machine for it, over a socket pair."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from smolrun.errors import HostError
from smolrun.launch.control import StartMessage, encode
from smolrun.launch.delivery.code import deliver_code
from smolrun.launch.delivery.code_archive import CodeArchive, code_archive
from smolrun.launch.hosts import WorkerPlan
from smolrun.launch.nearby.agent import JoinAgent, Question
from smolrun.launch.nearby.joined import JoinedHost, JoinedMachine, JoinedWorker, joined_machine
from smolrun.launch.nearby.protocol import JoinRequest, code_hash, refusal
from smolrun.launch.remote.connection import CommandTimeout
from tests.launch.nearby.linked import linked
from tests.waiting import until

TARGET = "smolrun.models.gpt:build"
VERSIONS: dict[str, str | None] = {"smolrun": "0.1.0", "torch": "2.9"}


def hello(workdir: Path, **changes: object) -> JoinRequest:
    said = {
        "protocol": 1,
        "agent": "a",
        "name": "pi5",
        "versions": VERSIONS,
        "code": "c0de",
        "os": "linux",
        "cores": 4,
        "home": "/home/me",
        "workdir": str(workdir),
        "python": "/usr/bin/python3",
        "addresses": ["10.0.0.2"],
    }
    return JoinRequest(**{**said, **changes})  # type: ignore[arg-type]


class Joined:
    """A machine that has joined; `answers` are what its user says, one after the other."""

    def __init__(self, folder: Path, command: list[str] | None = None) -> None:
        self.workdir = folder / "joined"
        self.workdir.mkdir()
        self.agent = JoinAgent(self.workdir, {TARGET}, command)
        self.asked: list[Question] = []
        self.says = True

    def answer(self) -> None:
        """The user's answers, until the process ends."""
        while True:
            question = self.agent.questions.get()
            self.asked.append(question)
            question.reply(self.says)

    @contextmanager
    def machine(self) -> Iterator[JoinedMachine]:
        threading.Thread(target=self.answer, daemon=True).start()
        with linked(self.agent.on_open) as (coordinator, _):
            said = hello(self.workdir.resolve())
            yield joined_machine(said, coordinator, ["10.0.0.2"], host="pi5", cluster="home")


@pytest.fixture
def joined(tmp_path: Path) -> Joined:
    return Joined(tmp_path)


def start(machine: JoinedMachine, own: str | None = None, target: str = TARGET) -> JoinedWorker:
    message = StartMessage(
        rank=0,
        world_size=1,
        host="pi5",
        run_id="r",
        config={"model": {"target": target, "loss": None}},
        config_hash="h",
        secret="s",
        addresses=["10.0.0.2"],
        device="cpu",
        threads=3,
    )
    worker = JoinedHost(machine, own).start(WorkerPlan(message, Path("unused")))
    assert isinstance(worker, JoinedWorker)
    worker.write(encode(message))
    return worker


def all_of(read) -> bytes:
    heard = b""
    while data := read():
        heard += data
    return heard


def running(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_a_worker_has_its_three_pipes_folder_threads_and_exit_code(tmp_path: Path):
    code = (
        "import os, sys, json\n"
        "start = json.loads(sys.stdin.readline())\n"
        "print(start['secret'], os.getcwd(), os.environ['OMP_NUM_THREADS'], sys.stdin.read())\n"
        "print('log', file=sys.stderr)\nsys.exit(7)"
    )
    joined = Joined(tmp_path, running(code))
    with joined.machine() as machine:
        worker = start(machine)
        worker.write(b"more")
        worker.close_input()
        folder = joined.workdir.resolve() / "empty"
        assert all_of(worker.read_control).decode() == f"s {folder} 3 more\n"
        assert all_of(worker.read_log) == b"log\n"
        assert (worker.wait(), worker.lost(), worker.out_of_memory()) == (7, None, None)
        assert list(folder.iterdir()) == []


FOREVER = (
    "import sys, time, os, json\nprint(os.getpid(), flush=True)\n"
    "while True: time.sleep(0.01)"  # deaf to the end of its input
)


def pid_of(worker: JoinedWorker) -> int:
    return int(worker.read_control())


def test_a_kill_ends_a_worker_that_does_not_listen(tmp_path: Path):
    joined = Joined(tmp_path, running(FOREVER))
    with joined.machine() as machine:
        worker = start(machine)
        pid = pid_of(worker)
        worker.kill()
        worker.kill()
        assert worker.wait() == -9
        assert worker.lost() is None
        assert not psutil.pid_exists(pid)


def test_a_lost_coordinator_leaves_no_worker_behind(tmp_path: Path):
    joined = Joined(tmp_path, running(FOREVER))
    with joined.machine() as machine:
        worker = start(machine)
        pid = pid_of(worker)
        machine.connection.give_up()
        worker.wait()
        assert worker.lost() == "the connection was lost (it does not answer)"
        until(lambda: not psutil.pid_exists(pid))
    until(lambda: joined.agent.num_workers == 0)


def test_a_worker_that_cannot_be_started_says_why_in_its_log(tmp_path: Path):
    joined = Joined(tmp_path, [str(tmp_path / "nothing")])
    with joined.machine() as machine:
        worker = start(machine)
        assert all_of(worker.read_control) == b""
        assert b"No such file" in all_of(worker.read_log)
        assert (worker.wait(), worker.lost()) == (3, None)


def own_code(folder: Path, text: str = "def build(): pass\n") -> CodeArchive:
    folder.mkdir(exist_ok=True)
    (folder / "mymodel.py").write_text(text)
    return code_archive(folder, ["mymodel:build"]).own_only()


def test_own_files_run_once_they_are_allowed_and_only_as_they_were(joined: Joined, tmp_path: Path):
    joined.agent.command = running("import os, mymodel\nprint(mymodel.__file__)")
    with joined.machine() as machine:
        own = deliver_code(machine, own_code(tmp_path / "user"), "wheel").own
        refused = start(machine, own, "mymodel:build")
        assert b"has not allowed" in all_of(refused.read_log)

        machine.allow(own, ["mymodel:build"])
        machine.allow(own, ["mymodel:build"])
        (question,) = joined.asked  # not twice for the same files
        assert question.files == {"mymodel.py": b"def build(): pass\n"}
        assert question.targets == ["mymodel:build"]
        worker = start(machine, own, "mymodel:build")
        assert worker.wait() == 0, all_of(worker.read_log)

        Path(own, "mymodel.py").write_text("changed = True\n")
        worker = start(machine, own, "mymodel:build")
        assert b"has not allowed" in all_of(worker.read_log)
        other = deliver_code(machine, own_code(tmp_path / "user", "x = 1\n"), "wheel").own
        machine.allow(other, [])
        assert len(joined.asked) == 2


def test_own_files_that_are_not_allowed_are_an_error_with_their_names(
    joined: Joined, tmp_path: Path
):
    joined.says = False
    with joined.machine() as machine:
        own = deliver_code(machine, own_code(tmp_path / "user"), "wheel").own
        with pytest.raises(HostError, match=r"did not allow mymodel\.py to run there"):
            machine.allow(own, [])
        with pytest.raises(HostError, match="did not allow os:system to run there"):
            machine.allow(None, ["os:system"])
        worker = start(machine, None, "os:system")
        assert b"does not run 'os:system'" in all_of(worker.read_log)
        machine.allow(None, [TARGET])  # of smolrun itself: nobody is asked
        assert len(joined.asked) == 2


def test_a_question_that_is_never_answered_ends_with_the_request(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("smolrun.launch.nearby.joined._APPROVE_S", 0.1)
    with linked(joined.agent.on_open) as (coordinator, agent):
        said = hello(joined.workdir)
        machine = joined_machine(said, coordinator, ["::1"], host="pi5", cluster="home")
        with pytest.raises(CommandTimeout):
            machine.allow(None, ["os:system"])
        until(lambda: not agent._channels)


def test_files_come_and_go_whole(joined: Joined, tmp_path: Path):
    data = bytes(range(256)) * 20_000  # beyond the window
    source = tmp_path / "source"
    source.write_bytes(data)
    counted: list[int] = []
    with joined.machine() as machine:
        incoming = joined.workdir / "files" / ".incoming-1"
        incoming.mkdir(parents=True)
        machine.put(source, f"{incoming}/a", counted.append)
        machine.put(b"", f"{incoming}/empty")
        assert sum(counted) == len(data)
        assert sorted(path.name for path in incoming.iterdir()) == ["a", "empty"]
        machine.get(f"{incoming}/a", tmp_path / "back", most_bytes=len(data))
        assert (tmp_path / "back").read_bytes() == data
        with pytest.raises(HostError, match="5,120,000 bytes"):
            machine.get(f"{incoming}/a", tmp_path / "more", most_bytes=len(data) - 1)
        with pytest.raises(HostError, match="No such file"):
            machine.get(f"{incoming}/b", tmp_path / "more", most_bytes=10)
        assert not (tmp_path / "more").exists()


def test_nothing_outside_of_its_folder_is_touched(joined: Joined, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    inside = joined.workdir.resolve()
    (inside / "link").symlink_to(tmp_path)
    listing = {"a": [1, "0" * 64]}
    with joined.machine() as machine:
        for path in (str(secret), f"{inside}/../secret", f"{inside}/link/secret", "", str(inside)):
            with pytest.raises(HostError, match="outside"):
                machine.get(path, tmp_path / "back", most_bytes=10)
            with pytest.raises(HostError, match="outside"):
                machine.put(b"y", path)
            with pytest.raises(HostError, match="outside"):
                machine.allow(path or "..", [])
        with pytest.raises(HostError, match="part of a delivery"):
            machine.put(b"y", f"{inside}/sitecustomize.py")
        for request in (
            {"do": "clear", "folder": str(tmp_path)},
            {"do": "clear", "folder": str(inside)},
            {"do": "remove", "folder": f"{inside}/runs", "names": ["../../secret"]},
        ):
            with pytest.raises(HostError, match=r"outside|cannot be one"):
                machine.call("run_folder", request)
        for request in (
            {"do": "look", "root": str(tmp_path / "new"), "wanted": {}},
            {"do": "look", "root": f"{inside}/files", "wanted": {"../../new": listing}},
            {"do": "look", "root": f"{inside}/files", "wanted": {"k": {"/etc/passwd": [1, ""]}}},
            {"do": "look", "root": f"{inside}/files", "wanted": {}, "run": str(tmp_path / "new")},
            {"do": "drop", "root": f"{inside}/files", "incoming": str(tmp_path)},
        ):
            with pytest.raises(HostError, match=r"outside|cannot be one"):
                machine.call("store", request)
        for script in ("reach", "environment", "../store"):
            with pytest.raises(HostError, match="does not run the script"):
                machine.call(script, {})
        with pytest.raises(HostError, match="no shell commands"):
            machine.run(["true"])
    assert secret.read_text() == "x"
    assert not (tmp_path / "new").exists()


def test_the_answer_of_a_script_is_checked(joined: Joined):
    def wrong(channel, request):
        from smolrun.launch.nearby.frames import Kind

        channel.write(Kind.OUT, json.dumps({"left": "\x1b[31m"}).encode())
        channel.exit({})

    with linked(wrong) as (coordinator, _):
        machine = joined_machine(
            hello(joined.workdir), coordinator, ["::1"], host="pi5", cluster="home"
        )
        with pytest.raises(HostError, match="not valid"):
            machine.call("run_folder", {"do": "clear", "folder": "x"})


def test_only_the_same_smolrun_may_join(tmp_path: Path):
    same = hello(tmp_path)
    assert refusal(same, VERSIONS, "c0de", "home") is None
    older = hello(tmp_path, versions={**VERSIONS, "smolrun": "0.0.9"})
    assert refusal(older, VERSIONS, "c0de", "home") == (
        "pi5 has smolrun 0.0.9, home runs smolrun 0.1.0: install the same on both, for example "
        "`pip install smolrun==0.1.0` on pi5"
    )
    other = refusal(hello(tmp_path, code="beef"), VERSIONS, "c0de", "home")
    assert other is not None
    assert "code beef" in other
    assert refusal(hello(tmp_path, protocol=2), VERSIONS, "c0de", "home") is not None
    torch = hello(tmp_path, versions={**VERSIONS, "torch": "2.6"})
    assert refusal(torch, VERSIONS, "c0de", "home") is None  # a warning of provision's


def test_the_hash_of_the_code_ignores_line_ends_of_windows():
    files = {"a.py": b"x = 1\ny = 2\n", "b.py": b""}
    windows = {"a.py": b"x = 1\r\ny = 2\r\n", "b.py": b""}
    assert code_hash(files) == code_hash(windows)
    assert code_hash(files) != code_hash({**files, "b.py": b"z"})
    assert code_hash(files) != code_hash({"a.py": files["a.py"], "c.py": b""})
