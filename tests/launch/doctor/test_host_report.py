"""One host is asked all there is to ask; what fails becomes a finding, and the rest is asked."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import pytest

from smolrun.errors import HostError
from smolrun.launch.doctor.findings import Finding
from smolrun.launch.doctor.host_report import (
    HostReport,
    HostRequirements,
    LocalMachine,
    probe_host,
    required_names,
)

FOLDER = {"path": "/w", "found": "/w", "free": 50e9, "is_folder": True, "is_writable": True}
ANSWERS: dict[str, Any] = {
    "clock": {"time_s": 0.0},
    "system": {
        "bits": 64,
        "arch": "arm64",
        "folder": FOLDER,
        "gpus": [],
        "memory_total": 16e9,
        "memory_available": 8e9,
    },
    "network": {"interfaces": []},
    "power": {"sleep": {"pmset": {"sleep": 1}}, "throttle": {}},
    "firewall": {"kind": "macos", "is_on": True},
    "environment": {
        "python": "3.12.1",
        "executable": "/py",
        "packages": {"torch": "2.9.0"},
        "cuda": False,
        "mps": True,
        "cuda_build": None,
    },
}


class HostAddresses:
    """Answers from a table; `broken` questions fail, its clock is `ahead_s`."""

    name, os, workdir, python = "mini1", "darwin", "/w", "/py"

    def __init__(self, *broken: str, ahead_s: float = 0.0) -> None:
        self.broken = broken
        self.ahead_s = ahead_s
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        self.asked.append((script, request))
        if script in self.broken:
            raise HostError(self.name, f"{script} broke", "mend it")
        if script == "clock":
            return {"time_s": time.time() + self.ahead_s}
        answer: dict[str, Any] = ANSWERS[script]
        return answer

    def close(self) -> None:
        pass


def orders(**changes: Any) -> HostRequirements:
    given: dict[str, Any] = {"pythons": ["/py"], "requirements": ["torch>=2.6,<2.14"]}
    given |= {"is_given": True, "smolrun": None, "device": "auto", "memory_gb": None}
    return HostRequirements(**{**given, "setup": "smolrun task=setup cluster=home", **changes})


def test_all_is_asked_and_judged():
    host = HostAddresses(ahead_s=100.0)
    found = probe_host(host, orders())
    assert [what for what, _ in host.asked].count("clock") == 2
    assert set(found.facts) == set(ANSWERS)
    assert abs(found.facts["clock"]["offset_s"] - 100.0) <= found.facts["clock"]["uncertain_s"] + 1
    assert found.status.state == "usable"
    text = " ".join(one.what for one in found.findings)
    assert "100 s ahead" in text and "sleeps after 1 min" in text


def test_one_question_that_fails_keeps_no_other_from_being_asked():
    found = probe_host(HostAddresses("system", "environment"), orders())
    assert set(found.facts) == set(ANSWERS) - {"system", "environment"}
    assert not found.is_reachable
    assert found.status.sentence == "cannot run: system broke (and 1 more)"


def test_a_host_that_does_not_answer_cannot_run():
    error = HostError("pi5", "does not answer", "is it on?")
    found = HostReport("pi5", {}, [Finding.of(error)])
    assert found.status.sentence == "cannot run: does not answer"
    assert found.status.findings[0].hint == "is it on?"


def test_the_names_of_requirements():
    lines = ["torch>=2.6,<2.14", "msgspec", "tokenizers >=0.21", 'x[y]>1; python_version>"3"']
    assert required_names(lines) == ["torch", "msgspec", "tokenizers", "x"]


def test_it_answers_and_says_where_it_is(tmp_path: Path):
    machine = LocalMachine("here", tmp_path)
    assert machine.os == platform.system().lower()
    told = machine.call("system", {"workdir": machine.workdir})
    assert told["folder"]["found"] == str(tmp_path)
    machine.close()


def test_a_script_that_breaks_is_a_host_error(tmp_path: Path):
    request = {"me": "here", "nonce": "no hex", "listen": [], "wait_s": 0, "peers": {}}
    with pytest.raises(HostError, match="here: reach failed"):
        LocalMachine("here", tmp_path).call("reach", {**request, "expected": []})
