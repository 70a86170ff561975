"""A host and what is known of it: runs commands, scripts of on_host/ and workers there, and copies
files.

It does not know what is copied or what is run. probe.py makes a `Machine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolrun.launch.hosts import WorkerPlan, WorkerProcess
from smolrun.launch.local import worker_environment
from smolrun.launch.remote.call import call, no_python
from smolrun.launch.remote.connection import Completed, Connection, OnBytes
from smolrun.launch.remote.shell import Shell, command, environment_input
from smolrun.launch.remote.worker import RemoteWorker, start_worker


@dataclass(frozen=True)
class HostSpec:
    """What the cluster file says about reaching a host. `ssh_config` None: the user's usual files.
    `timeout_s` is for the login. Hints of errors name the `cluster`."""

    name: str
    ssh: str  # user@address:port or an alias
    python: str | None = None
    workdir: str | None = None
    torch: str = "auto"
    env: Mapping[str, str] = field(default_factory=dict)
    ssh_config: str | None = None
    timeout_s: float = 15.0
    cluster: str = "NAME"


@dataclass(frozen=True, eq=False)
class Machine:
    """A host that was probed. Methods raise HostError; several threads may use it at once.

    `python` is some Python >= 3.8, or "" if there is none and none was required; `home`, `workdir`
    and `python` are absolute, with "/" between their parts on every system. `installed`: the
    versions of the smolrun there and its libraries, where that is what its workers run.
    """

    spec: HostSpec
    connection: Connection
    shell: Shell
    os: str  # linux, darwin or windows
    home: str
    workdir: str
    python: str = ""
    cores: int = 1
    installed: Mapping[str, str | None] | None = None

    @property
    def name(self) -> str:
        """As the cluster file calls it."""
        return self.spec.name

    @property
    def address(self) -> str | None:
        """The host's IP address as the connection has it; None behind a jump host or a proxy."""
        return self.connection.address

    @property
    def addresses(self) -> list[str]:
        """Its IP addresses that are known here, best first."""
        return [self.address] if self.address is not None else []

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """What on_host/<script>.py answers there."""
        cluster = self.spec.cluster
        if not self.python:
            raise no_python(self.name, cluster)
        return call(
            self.connection,
            self.python,
            script,
            request,
            timeout_s,
            shell=self.shell,
            cluster=cluster,
        )

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        data: bytes = b"",
        timeout_s: float = 60.0,
    ) -> Completed:
        """Run a command there to its end, whatever its exit code."""
        line = command(self.shell, argv, env=env)
        data = environment_input(self.shell, env or {}) + data
        return self.connection.run(line, data=data, timeout_s=timeout_s)

    def put(self, source: Path | bytes, path: str, progress: OnBytes | None = None) -> None:
        """Copy a file there, whole or not at all; its folder must exist."""
        self.connection.put(source, self._for_sftp(path), progress)

    def get(
        self, path: str, target: Path, progress: OnBytes | None = None, *, most_bytes: int
    ) -> None:
        """Copy a file of at most `most_bytes` from there, whole or not at all; the folder of
        `target` must exist."""
        self.connection.get(self._for_sftp(path), target, progress, most_bytes=most_bytes)

    def allow(self, own: str | None, targets: Sequence[str]) -> None:
        """Have the user's own code allowed there; a login over SSH allows all."""

    def start_worker(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None = None
    ) -> RemoteWorker:
        """Start a worker there; it has channels of its own in the one connection."""
        return start_worker(self.connection, self.shell, argv, env=env, cwd=cwd)

    def close(self) -> None:
        """End the connection; workers that still run there end by themselves. Never raises."""
        self.connection.close()

    def _for_sftp(self, path: str) -> str:
        # The SFTP server of Windows calls C:/x /C:/x.
        return f"/{path}" if self.os == "windows" and path[1:2] == ":" else path


@dataclass(frozen=True)
class RemoteHost:
    """A machine that is ready for workers: `argv` starts one, in the folder `cwd` there. `env` is
    what the code needs; the host's own variables come from the cluster file."""

    machine: Machine
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str

    def start(self, plan: WorkerPlan) -> WorkerProcess:
        """Start one worker there. HostError."""
        env = worker_environment({**self.machine.spec.env, **self.env}, plan.start.threads)
        return self.machine.start_worker(self.argv, env, self.cwd)
