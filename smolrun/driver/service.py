"""serving.service: the server as a service of this account, which launchd or systemd starts when
the account logs in, and again after a failure.

    systemd   ~/.config/systemd/user/smolrun-NAME.service
    launchd   ~/Library/LaunchAgents/smolrun-NAME.plist

The file is shown; it is written, and the service started, only where the user says so. It holds the
words of the command line, and no secret. Sources: systemd.service(5), systemd.exec(5),
launchd.plist(5).
"""

from __future__ import annotations

import os
import plistlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolrun.config import RunConfig
from smolrun.config.suggest import problem
from smolrun.driver.detach import COMMAND
from smolrun.errors import ConfigError, SmolrunError
from smolrun.files import atomic_write
from smolrun.launch.supervisor_events import EXIT_BAD_CONFIG, EXIT_DONE
from smolrun.sanitize import echo, one_line
from smolrun.tracking.run_folder import OUTPUTS

FLAG = "--service"  # of our command: serve as the other words say
_RESTART_S = 60  # between a failure and the next start
_END_S = 60  # beyond the time that running answers get
_INSTALL_S = 60.0
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")
# Words of the command line that are about this start alone.
_OF_THIS_START = ("serving.service=", "detach=")


@dataclass(frozen=True)
class ServiceFile:
    """A file of the service manager, where it belongs, and the commands that install the service
    and remove it."""

    path: Path
    content: bytes
    install: list[list[str]]
    remove: list[list[str]]
    hint: str


def drive(config: RunConfig) -> int:
    """Show the service that `config` asks for, and install it if the user wants that; exit code."""
    file = service_file(config, Path.home(), Path.cwd(), sys.platform)
    echo(f"{file.path}:\n")
    echo(file.content.decode())
    if not _wants_it(config, file):
        echo("not installed; serving.service=install does that: it writes this file, then runs")
        _show(file.install)
        return EXIT_DONE
    install(file)
    echo(f"installed and started: {file.path.stem}; {file.hint}")
    echo("to see it: smolrun task=status or task=attach in this folder; to remove it:")
    _show([*file.remove, ["rm", str(file.path)]])
    return EXIT_DONE


def _wants_it(config: RunConfig, file: ServiceFile) -> bool:
    if config.serving.service == "install":
        return True
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    what = "replace the one that is there" if file.path.exists() else "install it"
    return input(f"{what}? [y/N] ").strip().lower() in ("y", "yes")


def _show(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        echo(f"    {' '.join(command)}")


def install(
    file: ServiceFile,
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> None:
    """Write the file and start the service. SmolrunError with what the service manager says."""
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file.path, file.content)
        for command in file.install:
            done = run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
            if done.returncode != 0:
                said = one_line(done.stderr.strip() or done.stdout.strip())
                raise SmolrunError(f"`{' '.join(command)}` failed: {said}; {file.path} is written")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SmolrunError(f"the service cannot be installed: {error}") from error


def service_file(config: RunConfig, home: Path, folder: Path, platform: str) -> ServiceFile:
    """The service that serves as `config` says, in `folder`. ConfigError where this system has no
    service manager that we know."""
    served = re.split(r"[\\/]", getattr(config.model, "run", config.model.name))[-1]
    name = _NOT_IN_NAMES.sub("_", config.run_name or served)
    words = [word for word in config.typed if not word.startswith(_OF_THIS_START)]
    argv = [*COMMAND, FLAG, *words]
    stop_s = int(config.serving.drain_s) + _END_S
    if platform == "darwin":
        return _launchd(f"smolrun-{name}", argv, home, folder, stop_s)
    if platform == "linux":
        return _systemd(f"smolrun-{name}", argv, home, folder, stop_s)
    what = f"{platform} has neither launchd nor systemd"
    line = problem("serving.service", config.serving.service, what, allowed="false")
    raise ConfigError(line)


def _systemd(name: str, argv: Sequence[str], home: Path, folder: Path, stop_s: int) -> ServiceFile:
    """KillMode=mixed: SIGTERM to the driver alone, which lets answers end. No page of it is
    swapped, and of all programs it is the first to end where memory is full."""
    lines = [
        "[Unit]",
        f"Description={_specifiers(name)}",
        "",
        "[Service]",
        "Type=exec",
        f"WorkingDirectory={_specifiers(str(folder))}",
        f"ExecStart={' '.join(map(_quoted, argv))}",
        "Restart=on-failure",
        f"RestartSec={_RESTART_S}",
        f"RestartPreventExitStatus={EXIT_BAD_CONFIG}",
        "KillMode=mixed",
        f"TimeoutStopSec={stop_s}",
        "MemorySwapMax=0",
        "OOMScoreAdjust=500",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    control = ["systemctl", "--user"]
    unit = f"{name}.service"
    return ServiceFile(
        home / ".config" / "systemd" / "user" / unit,
        "\n".join(lines).encode(),
        install=[[*control, "daemon-reload"], [*control, "enable", "--now", unit]],
        remove=[[*control, "disable", "--now", unit]],
        hint="it starts with your session; `loginctl enable-linger` makes that with the machine",
    )


def _launchd(name: str, argv: Sequence[str], home: Path, folder: Path, stop_s: int) -> ServiceFile:
    """KeepAlive: started again unless it ends by exit code 0, as it does when a user stops it."""
    log = str(folder / OUTPUTS / f"{name}.log")
    content = {
        "Label": name,
        "ProgramArguments": list(argv),
        "WorkingDirectory": str(folder),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": _RESTART_S,
        "ExitTimeOut": stop_s,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    path = home / "Library" / "LaunchAgents" / f"{name}.plist"
    domain = f"gui/{os.getuid() if hasattr(os, 'getuid') else 0}"
    return ServiceFile(
        path,
        plistlib.dumps(content, sort_keys=False),
        install=[["launchctl", "bootstrap", domain, str(path)]],
        remove=[["launchctl", "bootout", f"{domain}/{name}"]],
        hint="it starts with your session, and only then",
    )


def _quoted(word: str) -> str:
    """A word of ExecStart: systemd knows C's escapes, and expands $ and %."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + _specifiers(escaped).replace("$", "$$") + '"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")
