"""driver=HOST: real processes; the connection to the host leads to this machine, without SSH."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import platformdirs
import psutil
import pytest

from smolrun.checkpoints.run_names import latest_name
from smolrun.cli.compose import compose
from smolrun.config import RunConfig
from smolrun.driver import remote_driver
from smolrun.driver.runs import find_run, logs_of, opened
from smolrun.errors import HostError
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.remote.probe import probe_machine
from smolrun.tasks import attach, logs, status, stop
from smolrun.tracking.logs import LogQuery
from smolrun.tracking.past_runs import look
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import ANSWER, Request, View
from tests.launch.connection_here import ConnectionHere
from tests.tasks.background import LONG
from tests.waiting import until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")


class Box:
    """The host. `is_there` false: nobody answers."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.is_there = True
        self.connections: list[ConnectionHere] = []

    def open(self, spec: HostSpec, **limits: object) -> Machine:
        if not self.is_there:
            raise HostError(spec.name, "nobody answers", "is it on?")
        self.connections.append(ConnectionHere(name=spec.name))
        return probe_machine(spec, self.connections[-1])


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    here = tmp_path / "laptop"
    here.mkdir()
    monkeypatch.chdir(here)
    the_box = Box(tmp_path / "box")
    monkeypatch.setattr(remote_driver, "open_machine", the_box.open)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    return the_box


def configured(box: Box, *overrides: str) -> RunConfig:
    env = "{INDEX: 'https://me:canary@index'}"
    place = f"python: {sys.executable}, workdir: {box.workdir}"
    host = f"{{name: box, ssh: me@box, {place}, env: {env}}}"
    return compose([*LONG, f"cluster.hosts=[{host}]", "driver=box", *overrides])


def asked(task: str, run: str = "latest") -> RunConfig:
    return compose([f"task={task}", f"attach.run={run}", f"logs.run={run}", f"stop.run={run}"])


def end(folder: RunFolder) -> None:
    """Whatever a test did: the driver is gone, and its workers with it."""
    with opened(folder) as run:
        pid = run.ask(Request("")).driver.get("pid")
    if isinstance(pid, int) and psutil.pid_exists(pid):
        psutil.Process(pid).kill()


def drivers_below(folder: Path) -> list[int]:
    """Process ids of drivers that run below the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder) and "--driver" in process.cmdline():
                found.append(process.pid)
    return found


def processes_of(module: str) -> list[int]:
    """Process ids of this user's processes that run the module."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.username() == psutil.Process().username() and module in process.cmdline():
                found.append(process.pid)
    return found


@pytest.mark.timeout(180)
def test_it_is_started_seen_and_stopped_from_here(
    box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remote_driver.drive(configured(box)) == 0
    told = capsys.readouterr()
    folder = find_run("stop.run", "latest")
    try:
        assert f"smolrun task=attach attach.run={folder.run_id}" in told.out
        assert "box: preparing: " in told.err
        assert not Path("outputs/latest").exists(), "nothing here knows yet that it has begun"
        there = Path((folder.remote() or {})["folder"])
        assert there.is_relative_to(box.workdir / "driver")
        assert {path.name for path in folder.path.iterdir()} == {"config.yaml", "remote.json"}
        assert look(folder).state == "remote" and look(folder).may_be_running
        # There it is this machine's own run, on ranks of this machine.
        stored = (there / "config.yaml").read_text()
        assert "ssh: null" in stored and "address: 127.0.0.1" in stored
        metrics = there / "metrics.jsonl"
        until(lambda: metrics.exists() and metrics.read_text().count('"event": "step"') > 5, 60)
        assert status.drive(asked("status")) == 0
        assert f"{folder.run_id}  running" in capsys.readouterr().out
        assert latest_name(Path("outputs")) == folder.run_id
        # Its logs are read there; whoever no longer reads them leaves no process.
        followed = logs_of(folder, LogQuery(follow=True))
        found = [record for record in itertools.islice(followed, 8) if record is not None]
        assert any(record.rank == 0 and "is process" in record.message for record in found)
        assert {record.host for record in found if record.rank == 0} == {"box"}
        until(lambda: next(followed) is None)  # it waits for more
        followed.close()  # type: ignore[attr-defined]
        until(lambda: not processes_of("smolrun.tracking.logs"))
        assert stop.drive(asked("stop")) == 0
        assert "stopped (stopped by the user)" in capsys.readouterr().out
    finally:
        end(folder)
    # Its small files came here, so the machine may be off now.
    box.is_there = False
    assert json.loads((folder.path / "summary.json").read_text())["status"] == "stopped"
    assert "starting 1 rank" in folder.driver_log.read_text()
    assert attach.drive(asked("attach")) == 130
    capsys.readouterr()
    assert logs.drive(asked("logs")) == 0
    shown = capsys.readouterr().out
    assert "rank 0  box" in shown and "stopped (stopped by the user)" in shown
    assert list((box.workdir / "runs").iterdir()) == []


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_attach_shows_it_and_a_lost_machine_is_told(
    box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remote_driver.drive(configured(box, "training.steps=30", "checkpoint.every=0")) == 0
    folder = find_run("stop.run", "latest")
    try:
        capsys.readouterr()
        box.is_there = False
        status.drive(asked("status"))
        assert f"{folder.run_id}  unreachable" in capsys.readouterr().out
        with pytest.raises(HostError, match="box: nobody answers"):
            attach.drive(asked("attach"))
        box.is_there = True
        assert attach.drive(asked("attach")) == 0
        assert "done: 30 steps" in capsys.readouterr().out
    finally:
        end(folder)
    # The password of the URL in `env:` is in no file of either machine, and in no command line.
    files = [path for path in box.workdir.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if b"canary" in path.read_bytes()]
    assert "https://***@index" in (folder.path / "config.yaml").read_text()
    assert not any("canary" in line for one in box.connections for line in one.commands)


def test_ctrl_c_before_it_has_begun_ends_it_there(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model thinks for a minute before it can be loaded, so it is still preparing then."""
    Path("slow.py").write_text(
        "import threading\nprint('thinking', flush=True)\nthreading.Event().wait(60)\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    seen: list[int] = []

    def interrupt(line: str) -> None:
        if "thinking" in line:
            seen.extend(drivers_below(box.workdir))
            raise KeyboardInterrupt

    monkeypatch.setattr(remote_driver, "_say", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remote_driver.drive(configured(box, "model.target=slow:build"))
    assert seen
    until(lambda: not drivers_below(box.workdir), 15)
    assert list((box.workdir / "runs").iterdir()) == []


def test_what_fails_there_is_told_here_with_its_exit_code(
    box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(box, "data=text", "data.path=not_there.txt")
    assert remote_driver.drive(config) == 2
    told = capsys.readouterr().err
    assert "box: smolrun: " in told and "not_there.txt" in told
    assert "reach the other hosts" not in told, "there are none"
    assert not Path("outputs").exists()
    assert list((box.workdir / "runs").iterdir()) == []


def test_other_hosts_must_be_reached_from_there(
    box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"address: 10.0.0.1, workdir: {box.workdir}"
    host = f"{{name: box, ssh: me@box, python: {sys.executable}, {place}}}"
    other = "{name: pi, ssh: nobody@127.0.0.9}"
    config = compose([*LONG, f"cluster.hosts=[{host}, {other}]", "driver=box"])
    assert remote_driver.drive(config) == 3
    told = capsys.readouterr().err
    assert "box: smolrun: pi: " in told
    assert "has to reach the other hosts over SSH by itself" in told


def test_a_model_of_this_machine_is_named_where_the_host_has_none(box: Box) -> None:
    Path("mine").mkdir()
    folder = RunFolder(Path("outputs") / "20260131-142501-x-aaaa")
    folder.path.mkdir(parents=True)
    folder.write_config("{}")
    found = [
        remote_driver._model_here(compose(["task=serve", *model]))
        for model in (
            ["model=hf", "model.name=mine"],
            ["model=hf", "model.name=me/other"],
            ["model.run=142501-x"],
            ["model.run=142502-x"],
            [],
        )
    ]
    assert found[0] == "mine" and (found[2] or "").endswith(folder.run_id)
    assert found[1] is found[3] is found[4] is None


@pytest.mark.parametrize("folder", ["/home/me/..", "/"])
def test_a_host_does_not_choose_where_we_write(box: Box, folder: str) -> None:
    ready: Any = SimpleNamespace(argv=["python"], env={})
    with pytest.raises(HostError, match="invalid run folder"):
        remote_driver._keep(configured(box), HostSpec("box", "me@box"), ready, folder, "code")
    assert list(Path.cwd().iterdir()) == []


def foreign(signature: str | None, ssh_config: str) -> RunFolder:
    """A run folder as it comes out of an archive; without a signature, as older versions wrote."""
    folder = RunFolder(Path("outputs") / "20260131-142501-x-aaaa")
    folder.path.mkdir(parents=True)
    folder.write_config("{}")
    spec = {"name": "box", "ssh": "box", "python": None, "workdir": None, "torch": "auto"}
    remote = {
        "host": {**spec, "env": {}, "ssh_config": ssh_config, "timeout_s": 5}, "folder": "/x",
        "python": "/bin/sh", "env": {}, "code_of": "driver-x",
    }  # fmt: skip
    content = remote if signature is None else {"remote": remote, "signature": signature}
    (folder.path / "remote.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("signature", [None, "", "00" * 32, "\u00e9"])
@pytest.mark.parametrize("task", [attach, stop])
def test_a_foreign_run_folder_connects_nowhere_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signature: str | None, task: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    ran = tmp_path / "ran"
    Path("ssh_config").write_text(f"Host *\n  ProxyCommand sh -c 'touch {ran}; cat'\n")
    folder = foreign(signature, "ssh_config")
    with pytest.raises(HostError) as raised:
        task.drive(asked(task.__name__.rpartition(".")[2], folder.run_id))
    assert raised.value.host == folder.run_id
    assert status.drive(asked("status")) == 0
    assert not ran.exists()


def test_without_a_key_the_run_is_unreachable_and_the_key_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    folder = foreign("00" * 32, "ssh_config")
    (tmp_path / "config" / "smolrun" / "run_folders.key").write_bytes(b"")
    with pytest.raises(HostError, match=r"run_folders\.key") as raised:
        attach.drive(asked("attach", folder.run_id))
    assert raised.value.host == folder.run_id
    assert status.drive(asked("status")) == 0
    assert f"{folder.run_id}  unreachable" in capsys.readouterr().out


def test_each_file_that_is_brought_back_has_its_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, int] = {}

    def get(path: str, target: Path, *, most_bytes: int) -> None:
        limits[target.name] = most_bytes

    monkeypatch.setattr(remote_driver, "clear_all", lambda *_: None)
    spec = HostSpec("box", "me@box")
    remote = remote_driver._Remote(spec, "/x", "python", {}, "driver-x")
    machine: Any = SimpleNamespace(name="box", get=get)
    question = remote_driver.RemoteRun(RunFolder(tmp_path), remote)
    # The summary of a server whose driver has died is not that of its end.
    question._bring_back(machine, View(state="died", summary={"status": "serving"}))
    assert not limits
    question._bring_back(machine, View(state="done", summary={"status": "done"}))
    assert list(limits) == ["metrics.jsonl", "driver.log", "summary.json"]
    assert limits["summary.json"] < limits["driver.log"] < limits["metrics.jsonl"]


def test_it_is_the_latest_run_once_it_has_begun_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory: the answers of the machine are given here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    outputs, spec = Path("outputs"), HostSpec("box", "me@box")
    folders = [RunFolder(outputs / f"20260131-14250{n}-x-aaaa") for n in range(3)]
    for folder in folders:
        folder.path.mkdir(parents=True)
        folder.write_config("{}")
    folders[0].become_latest()
    folders[1].write_remote({"host": {}})
    assert find_run("attach.run", "latest").run_id == folders[1].run_id, "it may begin any time"
    answers: list[View] = []

    def run(*_: Any) -> Any:
        return SimpleNamespace(
            out=ANSWER.encode() + msgspec.json.encode(answers[0]), err="", code=0
        )

    machine: Any = SimpleNamespace(name="box", run=run)
    monkeypatch.setattr(remote_driver, "open_machine", lambda *_: machine)
    remote = remote_driver.RemoteRun(
        folders[1], remote_driver._Remote(spec, "/x", "python", {}, "driver-x")
    )
    answers[:] = [View("running")]
    remote.ask(Request(""))
    assert latest_name(outputs) == folders[0].run_id
    answers[:] = [View("running", has_begun=True)]
    remote.ask(Request(""))
    assert latest_name(outputs) == folders[1].run_id
    folders[2].become_latest()
    remote.ask(Request(""))
    assert latest_name(outputs) == folders[2].run_id, "a newer one has begun since"


def test_a_record_that_makes_no_sense_is_told(box: Box) -> None:
    folder = RunFolder(Path("outputs") / "20260131-142501-x-aaaa")
    folder.path.mkdir(parents=True)
    folder.write_config("{}")
    folder.write_remote({"folder": 5})
    with pytest.raises(HostError, match=r"remote\.json is invalid"):
        attach.drive(asked("attach", folder.run_id))


def test_a_machine_without_our_code_is_told(box: Box) -> None:
    folder = RunFolder(Path("outputs") / "20260131-142501-x-aaaa")
    folder.path.mkdir(parents=True)
    folder.write_config("{}")
    spec = {"name": "box", "ssh": "box", "python": sys.executable, "workdir": str(box.workdir)}
    folder.write_remote(
        {
            "host": {**spec, "torch": "auto", "env": {}, "timeout_s": 5},
            "folder": "/nowhere", "python": "/bin/false", "env": {}, "code_of": "driver-x",
        }
    )  # fmt: skip
    with pytest.raises(HostError, match=r"cannot report on 20260131.*: exit code 1"):
        attach.drive(asked("attach", folder.run_id))
