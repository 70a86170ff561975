"""This machine answers the scripts of the hosts as others do."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from smolrun.errors import HostError
from smolrun.launch.doctor.this_machine import ThisMachine


def test_it_answers_and_says_where_it_is(tmp_path: Path):
    machine = ThisMachine("here", tmp_path)
    assert machine.os == platform.system().lower()
    told = machine.call("system", {"workdir": machine.workdir})
    assert told["folder"]["found"] == str(tmp_path)
    machine.close()


def test_a_script_that_breaks_is_a_host_error(tmp_path: Path):
    request = {"me": "here", "nonce": "no hex", "listen": [], "wait_s": 0, "peers": {}}
    with pytest.raises(HostError, match="here: reach failed"):
        ThisMachine("here", tmp_path).call("reach", {**request, "expected": []})
