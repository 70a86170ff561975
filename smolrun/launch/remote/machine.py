"""A host of the cluster that answered: its shell, system, folders and a Python that can be asked.

Knows what a run needs of a machine, but neither what is copied there nor what is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolrun.errors import SmolrunError
from smolrun.launch.remote.call import call
from smolrun.launch.remote.connection import Completed, Connection, OnBytes
from smolrun.launch.remote.probe import Facts, learn, no_python
from smolrun.launch.remote.shell import command, environment_input
from smolrun.launch.remote.worker import RemoteWorker, start_worker
from smolrun.launch.run_on_all import on_all
from smolrun.launch.ssh.connect import connect
from smolrun.launch.ssh.login import AskPassword

_LEAST_SHELL_S = 10.0  # a Pi with a slow card takes its time for the first command


@dataclass(frozen=True)
class HostSpec:
    """What the cluster file says of a host, as far as reaching it goes."""

    name: str
    ssh: str
    python: str | None = None
    workdir: str | None = None
    torch: str = "auto"
    env: Mapping[str, str] = field(default_factory=dict)


class Machine:
    """A host that answered. Methods raise HostError; several threads may use it at once.

    `python` is some Python >= 3.8, or "" if it was allowed to have none; `home`, `workdir` and
    `python` are absolute, with "/" between their parts on every system.
    """

    def __init__(
        self, spec: HostSpec, connection: Connection, facts: Facts, *, cluster: str = "NAME"
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
        """Where our connection to it goes, as numbers; None if that is not the host itself."""
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


def open_machine(
    spec: HostSpec,
    *,
    ssh_config: str | None = None,
    timeout_s: float = 15.0,
    cluster: str = "NAME",
    needs_python: bool = True,
    ask_password: AskPassword | None = None,
) -> Machine:
    """Log in, and learn what runs must know. `timeout_s` is for the login.

    `needs_python` False (task=setup): without any Python the machine is there all the same, and its
    workdir has not been made.
    """
    connection = connect(
        spec.name,
        spec.ssh,
        ssh_config=ssh_config,
        timeout_s=timeout_s,
        cluster=cluster,
        ask_password=ask_password,
    )
    try:
        shell_s = max(timeout_s, _LEAST_SHELL_S)
        return meet(spec, connection, cluster=cluster, needs_python=needs_python, shell_s=shell_s)
    except BaseException:
        connection.close()
        raise


def open_machines(
    specs: Sequence[HostSpec],
    *,
    ssh_config: str | None = None,
    timeout_s: float = 15.0,
    cluster: str = "NAME",
    missing: dict[str, SmolrunError] | None = None,
) -> dict[str, Machine]:
    """All of them at once, by name. If one fails none stays open, and all failures are told; where
    there is a dict `missing`, it is left out instead, and its failure is put there."""
    opened: list[Machine] = []
    given_up = False

    def open_one(spec: HostSpec) -> Machine | None:
        try:
            machine = open_machine(
                spec, ssh_config=ssh_config, timeout_s=timeout_s, cluster=cluster
            )
        except SmolrunError as error:
            if missing is None:
                raise
            missing[spec.name] = error
            return None
        opened.append(machine)
        if given_up:  # Ctrl-C came while this one was on its way
            machine.close()
        return machine

    try:
        found = on_all({spec.name: spec for spec in specs}, open_one, "open")
        return {name: machine for name, machine in found.items() if machine is not None}
    except BaseException:
        given_up = True
        for machine in opened:
            machine.close()
        raise


def meet(
    spec: HostSpec,
    connection: Connection,
    *,
    cluster: str = "NAME",
    needs_python: bool = True,
    shell_s: float = 30.0,
) -> Machine:
    """The machine at the other end of a connection that is open."""
    facts = learn(spec, connection, cluster=cluster, needs_python=needs_python, shell_s=shell_s)
    return Machine(spec, connection, facts, cluster=cluster)
