"""One host's inside: its own processes, files laid over the box's, name and hosts file.

Pid 1 of the host is a `cat` that the lab feeds: when the lab's process ends, however it ends, `cat`
reads the end of its input, and the kernel ends all other processes of the host with it. Knows
nothing of cables and of SSH.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts.network import LabError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Runs as pid 1. It tells its pid as the box counts, then sees only its own host's processes.
# CHLD is ignored, so that the kernel itself clears orphans away.
PID_1 = """
set -e
read -r pid rest < /proc/self/stat
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
echo "$NAME" > /proc/sys/kernel/hostname
for file in "$ETC"/*; do
    if [ -e "/etc/${file##*/}" ]; then mount --bind "$file" "/etc/${file##*/}"; fi
done
for folder in $HIDDEN; do mount -t tmpfs -o size=64k tmpfs "$folder"; done
echo "$pid"
trap '' CHLD
exec cat > /dev/null
"""


@dataclass(frozen=True)
class Process:
    """A process of a host. Signals from a test go to `pid`; the host itself knows `pid_there`."""

    pid: int
    pid_there: int
    parent: int
    command: tuple[str, ...]

    @property
    def is_sshd(self) -> bool:
        """The server itself or one of its sessions."""
        return Path(self.command[0].split(":")[0]).name.startswith("sshd")


class Container:
    """A host's processes and files. `etc` holds files that it sees in place of the box's own."""

    def __init__(
        self, name: str, namespace: str, home: Path, etc: Path, hidden: Sequence[Path] = ()
    ) -> None:
        self.name = name
        self.home = home
        self.workdir = home / "work"
        self.workdir.mkdir()
        self.environment = {"HOME": str(home), "USER": "root", "SHELL": "/bin/bash", "PATH": PATH}
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "sh", "-c"]
        values = {"NAME": name, "ETC": str(etc), "HIDDEN": " ".join(map(str, hidden))}
        self._started: list[subprocess.Popen[bytes]] = []
        self._pid_1 = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *unshare, PID_1],
            env=self.environment | values,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the lab, which ends it in order
        )

    def wait_until_up(self) -> None:
        """Blocks until its files are in place."""
        assert self._pid_1.stdout is not None
        assert self._pid_1.stderr is not None
        line = self._pid_1.stdout.readline()
        if not line:
            raise LabError(f"{self.name} does not start: {self._pid_1.stderr.read().decode()}")
        self._init = int(line)
        self._pids = os.readlink(f"/proc/{self._init}/ns/pid")

    def end(self, timeout_s: float = 10.0) -> None:
        """End every process of the host. May come twice."""
        assert self._pid_1.stdin is not None
        self._pid_1.stdin.close()
        deadline = time.monotonic() + timeout_s
        waiting = [self._pid_1, *self._started]
        while waiting := [one for one in waiting if one.poll() is None]:
            # The `nsenter` of a frozen one stands still too, and would never learn that it ended.
            # They are woken, not killed: each has to collect its own dead, or the kernel waits.
            late_s = time.monotonic() - deadline
            _signal((one.pid for one in waiting), signal.SIGKILL if late_s > 0 else signal.SIGCONT)
            if late_s > timeout_s:
                raise LabError(f"{self.name}: {[one.args for one in waiting]} do not end")
            time.sleep(0.002)

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on the host, not through SSH; a kill of what this gives ends nothing."""
        inside = ["nsenter", "-t", str(self._init), "-n", "-m", "-u", "-p", "--"]
        there = ["sh", "-c", 'cd && exec "$@"', "sh", *argv]
        options = {"env": self.environment, "start_new_session": True} | options
        process = subprocess.Popen([*inside, *there], **options)
        self._started = [one for one in self._started if one.poll() is None] + [process]
        return process

    def run(self, *argv: str, data: str = "", timeout_s: float = 30.0) -> str:
        """Run a command on the host, not through SSH; gives its stdout, LabError if it fails."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = self.start(*argv, **pipes)
        out, err = process.communicate(data.encode(), timeout=timeout_s)
        if process.returncode:
            said = err.decode(errors="replace").strip()
            raise LabError(
                f"{self.name}: `{' '.join(argv)}` ended with {process.returncode}: {said}"
            )
        return out.decode()

    def processes(self, *, sshd: bool = False) -> list[Process]:
        """What runs on the host but its pid 1, and SSH's own processes unless `sshd`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            try:
                if pid == self._init or os.readlink(folder / "ns" / "pid") != self._pids:
                    continue
                words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                status = dict(
                    line.split(":\t", 1)
                    for line in (folder / "status").read_text().splitlines()
                    if ":\t" in line
                )
            except OSError:
                continue  # it ended while we looked, or is none of ours
            if status["State"].startswith("Z"):
                continue
            line = tuple(word.decode(errors="replace") for word in words)
            there = int(status["NSpid"].split()[-1])
            found.append(Process(pid, there, int(status["PPid"]), line))
        return [one for one in found if sshd or not one.is_sshd]

    def kill(self, *pids: int) -> None:
        """kill -9, by the box's pids; what is gone already is fine."""
        _signal(pids, signal.SIGKILL)

    def freeze(self, *, sshd: bool = False, timeout_s: float = 10.0) -> None:
        """Every process stands still, as of a machine with no memory left; `sshd`: SSH's too."""
        deadline = time.monotonic() + timeout_s
        while moving := [one.pid for one in self.processes(sshd=sshd) if not _stands_still(one)]:
            if time.monotonic() > deadline:
                raise LabError(f"{self.name}: processes {moving} do not stop")
            _signal(moving, signal.SIGSTOP)
            time.sleep(0.005)

    def thaw(self) -> None:
        """They go on where they were."""
        # `nsenter` stops with what it has started, and wakes it when it is woken.
        _signal([one.pid for one in self._started if one.poll() is None], signal.SIGCONT)
        _signal([one.pid for one in self.processes(sshd=True)], signal.SIGCONT)

    def small_disk(self, megabytes: float) -> None:
        """From now on the workdir is an empty disk of that size; it is seen from the host only."""
        size = f"size={round(megabytes * 1024)}k"
        self.run("mount", "-t", "tmpfs", "-o", size, "tmpfs", str(self.workdir))

    def read_only_disk(self) -> None:
        """From now on the workdir is an empty disk that nobody, root included, can write to."""
        self.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(self.workdir))

    def first_disk(self) -> None:
        """Take `small_disk` or `read_only_disk` off again."""
        self.run("umount", "--lazy", str(self.workdir))


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _stands_still(process: Process) -> bool:
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "TtZX"
