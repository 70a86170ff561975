"""Gets to know a machine at the other end of a connection: shell, system, folders, a Python.

Three questions, each the next one's ground: which shell answers, what is there, and then, to a
Python of that machine, the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from smolrun.errors import HostError
from smolrun.launch.remote import find_python
from smolrun.launch.remote.call import call, get_python
from smolrun.launch.remote.connection import Connection, TookTooLong
from smolrun.launch.remote.error_tail import last_words
from smolrun.launch.remote.shell import PROBE, Shell, command, which_shell

DEFAULT_WORKDIR = "~/.cache/smolrun"
_ANSWER_S = 30.0  # a Pi with a slow card takes its time


class Wishes(Protocol):
    """What the cluster file says of it."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def python(self) -> str | None:
        """Where its Python is; None: to be found."""

    @property
    def workdir(self) -> str | None:
        """Where code and data shall be; None: in a cache folder."""


@dataclass(frozen=True)
class Facts:
    """What is known of a machine. Paths are absolute, with "/" between their parts."""

    shell: Shell
    os: str  # linux, darwin or windows
    home: str
    workdir: str
    python: str = ""  # some Python >= 3.8; empty: none was found
    python_version: str = ""
    user: str = ""
    architecture: str = ""
    cores: int = 1


def learn(
    wishes: Wishes,
    connection: Connection,
    *,
    cluster: str = "NAME",
    needs_python: bool = True,
    shell_s: float = _ANSWER_S,
) -> Facts:
    """Ask; HostError if it is of no use. Its workdir is there afterwards, if it has a Python.

    `shell_s` is how long its login shell may take to start.
    """
    shell = _shell(connection, shell_s)
    found = _look_around(wishes, connection, shell)
    failures: list[HostError] = []
    for python in [wishes.python] if wishes.python else found.pythons:
        try:
            return _asked(wishes, connection, shell, python, cluster)
        except (_CannotUse, TookTooLong):
            raise
        except HostError as error:
            failures.append(error)
    if wishes.python and failures:
        raise failures[0]
    if needs_python:
        raise no_python(wishes.name, cluster, failures)
    return Facts(shell, found.os, found.home, found.workdir)


class _CannotUse(HostError):
    """A Python that works well says why the machine cannot be used: no other need be tried."""


def _asked(
    wishes: Wishes, connection: Connection, shell: Shell, python: str, cluster: str
) -> Facts:
    request = {"workdir": wishes.workdir or DEFAULT_WORKDIR}
    said = call(connection, python, "host_probe", request, _ANSWER_S, shell=shell, cluster=cluster)
    if said["problem"]:
        raise _CannotUse(
            wishes.name,
            f"its folder {said['workdir']} cannot be used: {said['problem']}",
            "make room or give the folder to its user, or set `workdir:` in the cluster file",
        )
    return Facts(
        shell,
        said["os"],
        said["home"],
        said["workdir"],
        said["executable"],
        said["python"],
        said["user"],
        said["architecture"],
        said["cores"],
    )


def _shell(connection: Connection, timeout_s: float) -> Shell:
    try:
        done = connection.run(PROBE, timeout_s=timeout_s)
    except TookTooLong:
        raise TookTooLong(
            connection.name,
            f"lets us in, but its login shell runs no command within {timeout_s:g} s",
            "what do its start-up files (.bashrc, .zshenv) wait for?",
        ) from None
    shell = which_shell(done.out.decode("utf-8", "replace"))
    if shell is None:
        raise HostError(
            connection.name,
            f"its login shell runs no commands: {last_words(done.err, done.out)}",
            "smolrun needs an account with an ordinary shell",
        )
    return shell


def _look_around(wishes: Wishes, connection: Connection, shell: Shell) -> find_python.Answer:
    workdir = wishes.workdir or DEFAULT_WORKDIR
    if shell is Shell.POSIX:
        question = find_python.unix_question(workdir).encode()
        done = connection.run("exec sh -s", data=question, timeout_s=_ANSWER_S)
    else:
        line = command(shell, find_python.windows_question(workdir))
        done = connection.run(line, timeout_s=_ANSWER_S)
    found = find_python.understood(done.out.decode("utf-8", "replace"))
    if found is None:
        words = last_words(done.err, done.out)
        raise HostError(connection.name, f"its shell does not say what is there: {words}")
    return found


def no_python(name: str, cluster: str, failures: Sequence[HostError] = ()) -> HostError:
    """Nothing there can run a script of ours."""
    tried = "; " + "; ".join(error.what for error in failures) if failures else ""
    return HostError(
        name,
        f"has no Python 3.8 or newer in any of the usual places{tried}",
        get_python(cluster),
    )
