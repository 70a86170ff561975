"""The wake lock: held while we live, by whatever the system has, and never in the way."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from smolrun.launch import wake
from tests.waiting import until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the fake commands are sh scripts")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH; a tool in it notes its pid and arguments in `said`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "sleep"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    return folder


def make_tool(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(
        f'#!/bin/sh\necho "$$ $@" > "$SAID.part"\n/bin/mv "$SAID.part" "$SAID"\n{body}\n'
    )
    file.chmod(0o755)


def said(folder: Path) -> list[str]:
    file = folder.parent / "said"
    until(file.exists)
    return file.read_text().split()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# What systemd-inhibit does: run the command behind the options, with our stdin.
INHIBIT = 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'


def test_linux_holds_a_lock_that_ends_with_the_block(tools: Path):
    make_tool(tools, "systemd-inhibit", INHIBIT)
    with wake.keep_awake("linux"):
        pid, *argv = said(tools)
        assert argv[0] == "--what=idle:sleep"
        assert "--mode=block" in argv
        assert not is_gone(int(pid))
    assert is_gone(int(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="the fake tool is that of Linux")
def test_a_switch_holds_a_lock_while_it_is_on(tools: Path):
    make_tool(tools, "systemd-inhibit", INHIBIT)
    with wake.AwakeSwitch() as switch:
        switch.set(False)
        switch.set(True)
        first = int(said(tools)[0])
        switch.set(True)
        assert not is_gone(first)
        assert int(said(tools)[0]) == first
        switch.set(False)
        assert is_gone(first)
        (tools.parent / "said").unlink()
        switch.set(True)
        second = int(said(tools)[0])
        assert not is_gone(second)
    assert is_gone(second)


def test_macos_watches_our_process(tools: Path):
    make_tool(tools, "caffeinate", "exec sleep 60")
    with wake.keep_awake("darwin"):
        pid, *argv = said(tools)
        assert argv == ["-i", "-w", str(os.getpid())]
    assert is_gone(int(pid))


def test_the_lock_ends_with_a_process_that_is_killed(tools: Path, monkeypatch: pytest.MonkeyPatch):
    make_tool(tools, "systemd-inhibit", INHIBIT)
    code = (
        "import signal\nfrom smolrun.launch.wake import keep_awake\n"
        "with keep_awake('linux'):\n    signal.pause()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code])
    try:
        pid = int(said(tools)[0])
        assert not is_gone(pid)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    until(lambda: is_gone(pid))


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_machine_without_the_tool_is_left_alone(
    tools: Path, platform: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO), wake.keep_awake(platform):
        pass
    assert "this machine may fall asleep" in caplog.text
    assert "is not there" in caplog.text


def test_a_tool_that_is_not_allowed_is_told(tools: Path, caplog: pytest.LogCaptureFixture):
    make_tool(tools, "systemd-inhibit", "exit 1")
    with caplog.at_level(logging.INFO), wake.keep_awake("linux"):
        until(lambda: "systemd-inhibit ended with 1" in caplog.text)


def test_what_holds_it_awake_is_told(tools: Path, caplog: pytest.LogCaptureFixture):
    make_tool(tools, "systemd-inhibit", INHIBIT)
    with caplog.at_level(logging.INFO), wake.keep_awake("linux"):
        until(lambda: "kept awake by systemd-inhibit" in caplog.text)


def test_an_error_of_the_block_is_not_swallowed(tools: Path):
    make_tool(tools, "systemd-inhibit", INHIBIT)
    with pytest.raises(KeyError), wake.keep_awake("linux"):
        pid = int(said(tools)[0])
        raise KeyError("of the run")
    assert is_gone(pid)


def test_windows_asks_from_one_thread_and_takes_it_back(monkeypatch: pytest.MonkeyPatch):
    import threading

    asked: list[tuple[int, str]] = []

    def set_state(flags: int) -> int:
        asked.append((flags, threading.current_thread().name))
        return 1

    kernel = SimpleNamespace(SetThreadExecutionState=set_state)
    monkeypatch.setattr(wake, "_windows_kernel", lambda: kernel)
    with wake.keep_awake("win32"):
        until(lambda: len(asked) == 1)
    assert asked == [(0x80000001, "smolrun-awake"), (0x80000000, "smolrun-awake")]
