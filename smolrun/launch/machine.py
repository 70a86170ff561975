"""A host of the cluster that answered: its shell, system, folders and a Python that can be asked.

Knows what a run needs of a machine, but neither what is copied there nor what is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolrun.errors import HostError
from smolrun.launch import find_python
from smolrun.launch.at_once import on_all
from smolrun.launch.call import call
from smolrun.launch.connection import Completed, Connection, OnBytes
from smolrun.launch.remote_worker import RemoteWorker, start_worker
from smolrun.launch.shell import PROBE, Shell, command, which_shell
from smolrun.launch.ssh.connect import connect
from smolrun.launch.ssh.login import AskPassword

DEFAULT_WORKDIR = "~/.cache/smolrun"
_SHELL_S = 30.0  # a Pi with a slow card takes its time for the first command


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
        self,
        spec: HostSpec,
        connection: Connection,
        *,
        shell: Shell,
        os: str,
        home: str,
        workdir: str,
        python: str,
        user: str = "",
        architecture: str = "",
        python_version: str = "",
        cores: int = 1,
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.connection = connection
        self.shell = shell
        self.os = os
        self.home = home
        self.workdir = workdir
        self.python = python
        self.user = user
        self.architecture = architecture
        self.python_version = python_version
        self.cores = cores

    @property
    def address(self) -> str | None:
        """Where our connection to it goes, as numbers; None if that is not the host itself."""
        return self.connection.address

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """What on_host/<script>.py answers there."""
        if not self.python:
            raise _no_python(self.name, "NAME")
        return call(self.connection, self.python, script, request, timeout_s, shell=self.shell)

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        data: bytes = b"",
        timeout_s: float = 60.0,
    ) -> Completed:
        """Run a command there to its end, whatever its exit code."""
        line = command(self.shell, argv, env=env)
        return self.connection.run(line, data=data, timeout_s=timeout_s)

    def put(self, source: Path | bytes, path: str, progress: OnBytes | None = None) -> None:
        """Copy a file there, whole or not at all; its folder must exist."""
        self.connection.put(source, self._for_sftp(path), progress)

    def get(self, path: str, target: Path, progress: OnBytes | None = None) -> None:
        """Copy a file from there, whole or not at all; the folder of `target` must exist."""
        self.connection.get(self._for_sftp(path), target, progress)

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
        return meet(spec, connection, cluster=cluster, needs_python=needs_python)
    except BaseException:
        connection.close()
        raise


def open_machines(
    specs: Sequence[HostSpec],
    *,
    ssh_config: str | None = None,
    timeout_s: float = 15.0,
    cluster: str = "NAME",
) -> dict[str, Machine]:
    """All of them at once, by name. If one fails none stays open, and all failures are told."""
    opened: list[Machine] = []
    given_up = False

    def open_one(spec: HostSpec) -> Machine:
        machine = open_machine(spec, ssh_config=ssh_config, timeout_s=timeout_s, cluster=cluster)
        opened.append(machine)
        if given_up:  # Ctrl-C came while this one was on its way
            machine.close()
        return machine

    try:
        return on_all({spec.name: spec for spec in specs}, open_one, "open")
    except BaseException:
        given_up = True
        for machine in opened:
            machine.close()
        raise


def meet(
    spec: HostSpec, connection: Connection, *, cluster: str = "NAME", needs_python: bool = True
) -> Machine:
    """The machine at the other end of a connection."""
    shell = _shell(connection)
    found = _look_around(spec, connection, shell)
    candidates = [spec.python] if spec.python else found.pythons
    failures: list[HostError] = []
    for python in candidates:
        try:
            return _asked(spec, connection, shell, python, cluster)
        except _CannotUse as error:
            raise error.told from None
        except HostError as error:
            failures.append(error)
    if spec.python and failures:
        raise failures[0]
    if needs_python:
        raise _no_python(spec.name, cluster, failures)
    return Machine(
        spec,
        connection,
        shell=shell,
        os=found.os,
        home=found.home,
        workdir=found.workdir,
        python="",
    )


class _CannotUse(Exception):
    """A Python that works well told why the machine cannot be used: no other need be tried."""

    def __init__(self, told: HostError) -> None:
        self.told = told


def _asked(
    spec: HostSpec, connection: Connection, shell: Shell, python: str, cluster: str
) -> Machine:
    request = {"workdir": spec.workdir or DEFAULT_WORKDIR}
    said = call(connection, python, "who", request, _SHELL_S, shell=shell)
    if said["problem"]:
        raise _CannotUse(
            HostError(
                spec.name,
                f"its folder {said['workdir']} cannot be used: {said['problem']}",
                "make room or give the folder to its user, or set `workdir:` in the cluster file",
            )
        )
    return Machine(
        spec,
        connection,
        shell=shell,
        os=said["os"],
        home=said["home"],
        workdir=said["workdir"],
        python=said["executable"],
        user=said["user"],
        architecture=said["architecture"],
        python_version=said["python"],
        cores=said["cores"],
    )


def _shell(connection: Connection) -> Shell:
    done = connection.run(PROBE, timeout_s=_SHELL_S)
    shell = which_shell(done.out.decode("utf-8", "replace"))
    if shell is None:
        words = (done.err.strip() or done.out.strip()).decode("utf-8", "replace").splitlines()
        raise HostError(
            connection.name,
            f"its login shell runs no commands: {words[-1][:300] if words else 'it said nothing'}",
            "smolrun needs an account with an ordinary shell",
        )
    return shell


def _look_around(spec: HostSpec, connection: Connection, shell: Shell) -> find_python.Answer:
    workdir = spec.workdir or DEFAULT_WORKDIR
    if shell is Shell.POSIX:
        question = find_python.unix_question(workdir).encode()
        done = connection.run("exec sh -s", data=question, timeout_s=_SHELL_S)
    else:
        line = command(shell, find_python.windows_question(workdir))
        done = connection.run(line, timeout_s=_SHELL_S)
    found = find_python.understood(done.out.decode("utf-8", "replace"))
    if found is None:
        words = done.err.decode("utf-8", "replace").strip()[-300:] or "it said nothing"
        raise HostError(connection.name, f"its shell does not say what is there: {words}")
    return found


def _no_python(name: str, cluster: str, failures: Sequence[HostError] = ()) -> HostError:
    tried = "; " + "; ".join(error.what for error in failures) if failures else ""
    return HostError(
        name,
        f"has no Python 3.8 or newer in any of the usual places{tried}",
        f"smolrun task=setup cluster={cluster} installs one, or set `python:` in the cluster file",
    )
