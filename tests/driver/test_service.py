"""A server as a service: what the service managers are given, and what is done to them."""

from __future__ import annotations

import plistlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolrun.cli import driver as cli_driver
from smolrun.cli.compose import compose
from smolrun.cli.run import drive
from smolrun.driver import service
from smolrun.errors import ConfigError, SmolrunError

WORDS = ["task=serve", "model=hf", "model.name=Qwen/Qwen3-4B", "serving.port=7700"]


def made(platform: str, folder: Path = Path("/home/me/work"), *words: str) -> service.ServiceFile:
    typed = [*WORDS, "serving.service=install", "detach=true", *words]
    config = compose(typed).with_typed(typed)
    return service.service_file(config, Path("/home/me"), folder, platform)


def test_systemd_starts_the_same_words_again_after_a_failure_and_never_swaps() -> None:
    file = made("linux")
    assert file.path == Path("/home/me/.config/systemd/user/smolrun-Qwen3-4B.service")
    lines = file.content.decode().splitlines()
    words = " ".join(f'"{word}"' for word in WORDS)
    command = f'ExecStart="{sys.executable}" "-P" "-m" "smolrun.cli" "--service" {words}'
    assert command in lines  # without serving.service and detach
    for line in ("WorkingDirectory=/home/me/work", "Restart=on-failure", "KillMode=mixed",
                 "RestartPreventExitStatus=2", "TimeoutStopSec=90", "MemorySwapMax=0",
                 "WantedBy=default.target"):  # fmt: skip
        assert line in lines
    unit = "smolrun-Qwen3-4B.service"
    assert file.install[-1] == ["systemctl", "--user", "enable", "--now", unit]
    assert file.remove == [["systemctl", "--user", "disable", "--now", unit]]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_reads_words_of_any_kind_as_they_were_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    words = [sys.executable, 'a "b" $c %d', "e\\f\ng"]
    file = service._systemd("smolrun-x", words, tmp_path, tmp_path / "100 % $HOME", 90)
    assert r'"a \"b\" $$c %%d" "e\\f\ng"' in file.content.decode()
    unit = tmp_path / "smolrun-x.service"
    unit.write_bytes(file.content)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(unit)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_launchd_starts_it_again_unless_a_user_has_stopped_it() -> None:
    file = made("darwin")
    assert file.path == Path("/home/me/Library/LaunchAgents/smolrun-Qwen3-4B.plist")
    found = plistlib.loads(file.content)
    assert found["ProgramArguments"][-5:] == ["--service", *WORDS]
    assert found["WorkingDirectory"] == "/home/me/work"
    assert found["KeepAlive"] == {"SuccessfulExit": False} and found["RunAtLoad"]
    assert file.install[-1][:2] == ["launchctl", "bootstrap"]


def test_other_systems_are_refused() -> None:
    with pytest.raises(ConfigError, match="win32 has neither launchd nor systemd"):
        made("win32")


def test_another_host_is_refused() -> None:
    with pytest.raises(ConfigError, match="a service belongs to the machine that runs it"):
        compose(["task=serve", "serving.service=true", "cluster=macmini3", "driver=mini1"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no service that we write")
def test_it_is_shown_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service.Path, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "serving.service=true", "detach=true"]
    assert drive(compose(words).with_typed(words)) == 0
    out = capsys.readouterr().out
    assert "serving.port=7700" in out and "not installed; serving.service=install" in out
    assert list(tmp_path.iterdir()) == []


def test_it_is_installed_by_the_manager_or_what_that_says_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "units" / "x.service"
    file = service.ServiceFile(path, b"text", [["reload"], ["enable"]], [], "")
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        code = 1 if command == ["enable"] and len(ran) > 2 else 0
        return subprocess.CompletedProcess(command, code, "", "no bus\n")

    service.install(file, run)
    assert path.read_bytes() == b"text" and ran == [["reload"], ["enable"]]
    with pytest.raises(SmolrunError, match=r"`enable` failed: no bus; .*x\.service is written"):
        service.install(file, run)


@pytest.mark.parametrize(("code", "expected"), [(130, 0), (131, 0), (0, 0), (2, 2), (3, 3)])
def test_a_server_that_a_user_has_stopped_is_no_failure_to_a_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: int
) -> None:
    asked: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_driver, "_be_a_driver", lambda: None)
    monkeypatch.setattr(cli_driver, "run", lambda words: asked.append(words) or code)
    monkeypatch.setattr("smolrun.driver.detach.log_into_run_folder", lambda: None)
    monkeypatch.setattr(sys, "argv", ["smolrun", "--service", *WORDS])
    assert cli_driver.service_main() == expected
    assert asked == [WORDS]
