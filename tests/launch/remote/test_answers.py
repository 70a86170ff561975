"""Hosts that answer anything at all: what comes of it is an answer of the right types, or HostError
with the host's name, and nothing else."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from smolrun.driver import doctor_text
from smolrun.errors import HostError
from smolrun.launch.doctor.host_report import HostRequirements, probe_host
from smolrun.launch.doctor.links import HostAddresses
from smolrun.launch.doctor.reachability import probe_reachability
from smolrun.launch.remote import answers, probe
from smolrun.launch.remote.call import call
from smolrun.launch.remote.connection import Completed
from smolrun.launch.remote.probe import probe_machine
from smolrun.launch.remote.shell import Shell
from smolrun.launch.remote.worker import start_worker
from smolrun.launch.setup import setup_plan
from smolrun.launch.setup.user_key import install
from smolrun.tasks.status import row
from smolrun.tracking.past_runs import look
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import ANSWER, View, decode

HOST = "box"
SIZE = 10**9
INTERFACE = {"name": "en0", "kind": "wifi", "speed_mbps": 300.0, "addresses": ["10.0.0.1/24"]}
FOLDER = {"path": "/w", "found": "/w", "free": SIZE, "is_folder": True, "is_writable": True}
HOST_PROBE = {
    "os": "linux", "cores": 4, "home": "/h", "executable": "/p", "workdir": "/w", "problem": None,
}  # fmt: skip
SYSTEM = {
    "user": "anna", "hostname": "box", "os": "linux", "system": "Debian", "arch": "arm64",
    "bits": 64, "model": "Pi", "cpu": None, "cores": 4, "usable_cores": 4, "memory_total": SIZE,
    "memory_available": SIZE, "python": {"path": "/p", "version": "3.12.1"},
    "gpus": [{"vendor": "nvidia", "name": "x"}], "jetson": False, "folder": FOLDER,
}  # fmt: skip
TORCH = {
    "python": "3.12.1", "executable": "/p", "packages": {"torch": "2.9.0"}, "cuda": False,
    "cuda_build": None, "mps": False,
    "score": {"flops": 1e9, "memory_bytes_per_s": 1e9, "device": "cpu"},
}  # fmt: skip
POWER = {
    "sleep": {"has_battery": True, "targets": ["masked"], "lid": "suspend", "desktop_s": 60},
    "throttle": {"temperature_c": 90.0, "pi_bits": 5, "frequency_cap": 0.5},
}
# (script, what it is asked to do, an honest answer)
HONEST: list[tuple[str, str | None, dict[str, Any]]] = [
    ("host_probe", None, HOST_PROBE),
    ("clock", None, {"time_s": 1.8e9}),
    ("store", "free", {"free": SIZE}),
    ("system", None, SYSTEM),
    ("network", None, {"interfaces": [INTERFACE]}),
    ("power", None, POWER),
    ("firewall", None, {"kind": "ufw", "is_on": True}),
    ("environment", None, TORCH),
    ("environment", None, {"error": "it crashed"}),
    ("environment", None, {"error": "/p is not there", "is_missing": True}),
    ("reach", None, {"port": 9, "heard": [], "dialed": {"b": [{"address": "a", "error": None}]}}),
    ("store", "look", {"missing": ["k"], "incoming": "/w/x", "free": SIZE}),
    ("store", "finish", {"wrong": []}),
    ("store", "finish", {"os_error": "full", "path": "/w"}),
    ("tree", "look", {"changed": [], "incoming": "", "free": SIZE}),
    ("tree", "finish", {"wrong": []}),
    ("run_folder", "clear", {"left": False}),
]  # fmt: skip
HOSTILE: list[Any] = [
    None, True, -1, -1e300, 10**30, 1e300, "", "x" * 100_000, "\x1b[2J", "9" * 30, [], [[]], {},
    {"x": {}}, [1] * 5, ["\x1b"], {"a": None}, "²", "3.٣", "nan",
]  # fmt: skip


class Answering:
    """A connection to a host that says `text` to everything; `%MARK` is the mark of the call."""

    name = HOST
    address = None
    lost = None
    is_silent = False

    def __init__(self, text: str) -> None:
        self.text = text

    def run(self, command: str, *, data: bytes = b"", timeout_s: float = 60.0) -> Completed:
        found = re.search(rb"smolrun-[0-9a-f]{16}", data)
        mark = found[0].decode() if found else ""
        return Completed(0, self.text.replace("%MARK", mark).encode("utf-8", "replace"), b"")


def ask(script: str, do: str | None, text: str) -> dict[str, Any]:
    connection: Any = Answering(f"%MARK {text}\n")
    return call(connection, "python", script, {"do": do} if do else {})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value can be changed."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    made = copy.deepcopy(value)
    place = made
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return made


def hostile(honest: Any) -> Iterator[Any]:
    """The answer with one part missing, or replaced by something else."""
    for path in places(honest):
        for new in (*HOSTILE, *([...] if path else [])):
            yield changed(honest, path, new)


def test_every_script_has_its_types():
    folder = resources.files("smolrun.launch.on_host")
    scripts = {
        file.name.removesuffix(".py") for file in folder.iterdir() if file.name[0] not in "_."
    }
    assert scripts - {"prelude"} == {key.split()[0] for key in answers._KINDS}


@pytest.mark.parametrize(("script", "do", "honest"), HONEST)
def test_an_honest_answer_is_taken_as_it_is(script: str, do: str | None, honest: dict[str, Any]):
    assert ask(script, do, json.dumps(honest)) == honest


@pytest.mark.parametrize(("script", "do", "honest"), HONEST)
def test_any_other_answer_is_an_error_of_that_host(
    script: str, do: str | None, honest: dict[str, Any]
):
    refused: list[HostError] = []
    for answer in hostile(honest):
        try:
            assert isinstance(ask(script, do, json.dumps(answer)), dict)
        except HostError as error:
            refused.append(error)
    assert len(refused) > len(HOSTILE) // 2
    assert {error.host for error in refused} == {HOST}
    assert max(len(str(error)) for error in refused) < 1000


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1", '"x"', "null", "[" * 100_000, '{"a":' * 100_000, '{"time_s": NaN}',
     '{"time_s": -Infinity}', '{"time_s": ' + "9" * 5000 + "}", "{'time_s': 1}", "\x00\xff",
     '{"time_s": 1} and more', "old ", "old \x1b[2J"],
)  # fmt: skip
def test_what_is_no_answer_is_an_error_of_that_host(text: str):
    with pytest.raises(HostError) as raised:
        ask("clock", None, text)
    assert raised.value.host == HOST
    assert "\x1b" not in str(raised.value)


def test_a_host_with_many_interfaces_and_addresses_is_taken_as_it_is():
    many = [INTERFACE | {"addresses": INTERFACE["addresses"] * 300}] * 300
    assert ask("network", None, json.dumps({"interfaces": many})) == {"interfaces": many}


class Lying:
    """A machine whose answers have passed, and are lies within their types."""

    name, os, workdir, python = HOST, "linux", "/w", "/p"

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        return ask(script, request.get("do"), json.dumps(self.told[script]))

    def close(self) -> None:
        pass


DOCTOR = {script: honest for script, _, honest in reversed(HONEST)}


@pytest.mark.parametrize(
    "script", ["clock", "system", "network", "power", "firewall", "environment"]
)
def test_doctor_makes_something_of_every_answer(script: str):
    """Findings, the row of the table and the details, whatever the host says."""
    orders = HostRequirements(
        ["/p"], ["torch"], True, None, "cuda", 4.0, "smolrun task=setup", measure=True
    )
    for answer in [DOCTOR[script], *hostile(DOCTOR[script])]:
        found = probe_host(Lying({**DOCTOR, script: answer}), orders)
        assert found.name == HOST
        assert all(isinstance(cell, str) for cell in doctor_text.row(found))
        assert all(isinstance(line, str) for line in doctor_text.details(found))
        assert found.status.state in ("fine", "usable", "cannot run")


def test_a_host_makes_no_addresses_up():
    hosts = {
        name: HostAddresses(name, (address,), ())
        for name, address in (("a", "10.0.0.1"), ("b", "10.0.0.2"))
    }
    rows = [{"address": address, "error": None} for address in ("6.6.6.6", "10.0.0.2")]
    lying = {"reach": {"port": None, "heard": [], "dialed": {"b": rows, "c": rows}}}
    silent = {"reach": {"port": None, "heard": [], "dialed": {}}}
    found = probe_reachability({"a": Lying(lying), "b": Lying(silent)}, hosts, {}, wait_s=0.0)
    assert found["a"]["dialed"] == {"b": [{"address": "10.0.0.2", "error": None}]}
    assert found["b"]["dialed"] == {"a": []}


def test_nothing_that_a_shell_says_is_a_traceback():
    """The answers that come as lines: of sh before there is a Python, and of a key's installer."""
    dice = random.Random(1)
    words = [*(str(one) for one in HOSTILE), "whole", "3.12", "²", "system", "python", "free", "os"]
    words += ["home", "libc", "uv", "nvidia", "workdir", setup_plan._MARK, probe._MARK]
    for _ in range(3000):
        text = " ".join(dice.choice(words)[:5000] for _ in range(dice.randrange(6)))
        for mark in (setup_plan._MARK, probe._MARK):
            what = dice.choice(words)
            setup_plan.parse_blank_host(f"{mark} {what} {text}\n{mark} {text}")
            probe.parse_answer(f"{mark} {what} {text}\n{mark} {text}")


class Spec:
    name, python, workdir, cluster = HOST, "/p", None, "home"


@pytest.mark.parametrize(
    "text", ["", "\x1b[2J", "smolrun-probe %OS%", "smolrun-probe %OS%\n%MARK {}"]
)
def test_a_host_that_says_nonsense_cannot_be_met(text: str):
    connection: Any = Answering(text)
    with pytest.raises(HostError) as raised:
        probe_machine(Spec(), connection)
    assert raised.value.host == HOST


def test_a_key_that_could_not_be_installed_is_told_in_one_line():
    class Machine:
        name, shell = HOST, Shell.POSIX

        def run(self, argv: list[str], **more: Any) -> Completed:
            return Completed(1, b"", "a\x1b[2J\r\u202eb\n\x9b2J".encode())

    machine: Any = Machine()
    with pytest.raises(HostError) as raised:
        install(machine, "ssh-ed25519 AAAA me")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("number", [b"9" * 6000 + b"\n", b"x\n", b"-1\n", b"9" * (1 << 20)])
def test_a_worker_whose_first_line_is_nonsense(number: bytes):
    """Its group is unknown then; a line without an end is no start."""

    class Process:
        def __init__(self, line: str) -> None:
            mark = re.search(r"smolrun-[0-9a-f]{16}", line)
            assert mark is not None
            self.out = [mark[0].encode() + b" " + number]

        def read_out(self) -> bytes:
            return self.out.pop() if self.out else b""

        def read_err(self) -> bytes:
            return b""

        def write(self, data: bytes) -> None:
            pass

        def wait(self) -> int:
            return 0

        def close(self) -> None:
            pass

    class Connected(Answering):
        def start(self, command: str) -> Any:
            return Process(command)

    connection: Any = Connected("")
    if number.endswith(b"\n"):
        assert start_worker(connection, Shell.POSIX, ["/p"], env={})._group is None
    else:
        with pytest.raises(HostError) as raised:
            start_worker(connection, Shell.POSIX, ["/p"], env={})
        assert raised.value.host == HOST


VIEW = {
    "state": "running",
    "driver": {"pid": 1, "host": "x", "steps": 10, "unit": "tokens", "has_log": True},
    "summary": {"exit_code": 3, "reason": "x", "steps": 5, "wall_s": 2.0, "final_train_loss": 1.0,
                "checkpoint": "x", "end": {"status": "done", "headline": "x",
                "figures": [["a", "b"]], "shares": [[0.5, "x"]], "prompt": "x",
                "samples": [["a", "b"]]}},
    "figures": {"step": 1, "steps": 2, "loss": 1.0, "left_s": 2.0, "age_s": 1.0},
    "metrics": {"lines": ["x"], "place": {"file": 1, "offset": 2}, "is_fresh": True},
}  # fmt: skip


def test_the_view_of_a_run_on_another_machine_has_its_types(tmp_path: Any):
    """task=status and attach show whatever is taken."""
    import dataclasses

    from smolrun.driver import run_summary

    folder = RunFolder(tmp_path / "20260131-142501-x-aaaa")
    folder.path.mkdir()
    assert isinstance(decode(ANSWER + json.dumps(VIEW)), View)
    for text in ("[" * 100_000, '{"state":' * 100_000, "", "null", '{"state": NaN}'):
        assert decode(ANSWER + text) is None
    for answer in hostile(VIEW):
        view = decode(ANSWER + json.dumps(answer))
        if view is not None:
            run = dataclasses.replace(look(folder), state=view.state, **view.figures)
            assert all(isinstance(cell, str) for cell in row(run))
            shown = run_summary.end_of(folder, view)
            assert [*shown.lines(), *shown.rows(80, has_blocks=True)]
            assert 0 <= run_summary.exit_code(view) < 256
