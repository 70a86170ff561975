"""`make lab`: says what to type, does it, and is gone after Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import by_hand
from tests.hosts.by_hand import obey
from tests.hosts.lab import Lab
from tests.waiting import until

pytestmark = pytest.mark.hosts
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_tells_how_to_get_in_and_ends_in_order(
    possible: None, tmp_path: Path, end: signal.Signals
):
    argv = [sys.executable, "-m", "tests.hosts.by_hand", "--hosts=1", f"--folder={tmp_path}"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        lines = []
        while "Ctrl-C" not in (line := process.stdout.readline()):
            assert line, process.communicate()
            lines.append(line.strip())
        assert lines[1].split("#")[0].strip() == f"ssh -F {tmp_path / 'ssh_config'} lab1"
        assert lines[2].startswith(f"cd {tmp_path} && ")
        assert lines[2].endswith("smolrun cluster=lab1")
        assert (tmp_path / "conf" / "cluster" / "lab1.yaml").is_file()
        argv = ["ssh", "-F", str(tmp_path / "ssh_config"), "lab1", "hostname"]
        assert subprocess.run(argv, capture_output=True, timeout=30).stdout == b"lab1\n"
        process.send_signal(end)
        out, err = process.communicate(timeout=50)
        assert (out, err, process.returncode) == ("\nThe lab is gone.\n", "", 0)


def test_it_says_why_there_can_be_no_lab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(by_hand, "missing", lambda: "the lab of hosts needs root")
    monkeypatch.setattr(sys, "argv", ["by_hand"])
    assert by_hand.main() == 2
    assert capsys.readouterr().err == "make lab: the lab of hosts needs root\n"


def test_it_does_what_is_typed(lab3: Lab):
    host = lab3.hosts[1]
    # An earlier test's processes may still be on their way out.
    until(lambda: obey(lab3.hosts, "processes 2\n") == "nothing")
    process = host.start("sleep", "1000")
    # At first it is still a copy of the process that starts it, without a command of its own.
    until(lambda: "sleep 1000" in obey(lab3.hosts, "processes 2"))
    assert process.poll() is None
    host.kill(*(one.pid for one in host.processes()))
    assert obey(lab3.hosts, "rate 2 10mbit") == obey(lab3.hosts, "lose 2 5") == "done"
    assert obey(lab3.hosts, "heal 2") == "done"
    assert obey(lab3.hosts, "\n") == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("explode 1", "none of cut"),
        ("end 1", "none of cut"),
        ("cut", "which host"),
        ("cut 4", "1 to 3"),
        ("rate 1", "missing a required argument"),
        ("lose 1 many", "many"),
    ],
)
def test_it_says_what_it_does_not_understand(lab3: Lab, line: str, said: str):
    with pytest.raises(ValueError, match=said):
        obey(lab3.hosts, line)
