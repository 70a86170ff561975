"""A probed host: runs commands, scripts of on_host/ and workers there, and copies files.

It does not know what is copied or what is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolrun.launch.hosts import WorkerPlan, WorkerProcess
from smolrun.launch.local import worker_environment
from smolrun.launch.remote.call import call
from smolrun.launch.remote.connection import Completed, Connection, OnBytes
from smolrun.launch.remote.probe import HostFacts, HostSpec, no_python, probe_facts
from smolrun.launch.remote.shell import command, environment_input
from smolrun.launch.remote.worker import RemoteWorker, start_worker


class Machine:
    """A host that was probed. Methods raise HostError; several threads may use it at once.

    `python` is some Python >= 3.8, or "" if there is none and none was required; `home`, `workdir`
    and `python` are absolute, with "/" between their parts on every system.
    """

    def __init__(
        self, spec: HostSpec, connection: Connection, facts: HostFacts, *, cluster: str = "NAME"
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.connection = connection
        self.shell = facts.shell
        self.os = facts.os
        self.home = facts.home
        self.workdir = facts.workdir
        self.python = facts.python
        self.python_version = facts.python_version
        self.user = facts.user
        self.architecture = facts.architecture
        self.cores = facts.cores
        self._cluster = cluster

    @property
    def address(self) -> str | None:
        """The host's IP address as the connection has it; None behind a jump host or a proxy."""
        return self.connection.address

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """What on_host/<script>.py answers there."""
        if not self.python:
            raise no_python(self.name, self._cluster)
        return call(
            self.connection,
            self.python,
            script,
            request,
            timeout_s,
            shell=self.shell,
            cluster=self._cluster,
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


def probe_machine(
    spec: HostSpec,
    connection: Connection,
    *,
    cluster: str = "NAME",
    needs_python: bool = True,
    shell_s: float = 30.0,
) -> Machine:
    """Probe the machine at the other end of an open connection."""
    facts = probe_facts(
        spec, connection, cluster=cluster, needs_python=needs_python, shell_s=shell_s
    )
    return Machine(spec, connection, facts, cluster=cluster)


class RemoteHost:
    """A machine that is ready for workers: `argv` starts one, in the folder `cwd` there."""

    def __init__(
        self, machine: Machine, argv: Sequence[str], env: Mapping[str, str], cwd: str
    ) -> None:
        """`env` is what the code needs; the host's own variables come from the cluster file."""
        self._machine = machine
        self._argv = list(argv)
        self._env = dict(env)
        self._cwd = cwd

    def start(self, plan: WorkerPlan) -> WorkerProcess:
        """Start one worker there. HostError."""
        env = worker_environment({**self._machine.spec.env, **self._env}, plan.start.threads)
        return self._machine.start_worker(self._argv, env, self._cwd)
