"""Probes a machine over a connection: its shell, system, folders, and a Python.

Three steps, each by means of the one before: which shell runs commands; where a Python may be (the
shell of a command over SSH reads no profile, so a Python on the user's PATH is not found by name:
the places where installers put it are tried one by one); and the rest, by `on_host/host_probe.py`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from smolrun.errors import HostError
from smolrun.launch.remote.call import call, no_python
from smolrun.launch.remote.connection import CommandTimeout, Connection, error_tail
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.remote.shell import PROBE, Shell, command, which_shell

DEFAULT_WORKDIR = "~/.cache/smolrun"
_ANSWER_S = 30.0  # a Pi with a slow card takes its time


def probe_machine(
    spec: HostSpec,
    connection: Connection,
    *,
    needs_python: bool = True,
    shell_s: float = _ANSWER_S,
) -> Machine:
    """Probe the machine at the other end of an open connection; HostError if no run can use it.
    Creates its workdir, if it has a Python.

    `shell_s` is how long its login shell may take to start.
    """
    shell = _shell(connection, shell_s)
    found = _probe_shell(spec, connection, shell)
    failures: list[HostError] = []
    for python in [spec.python] if spec.python else found.pythons:
        try:
            return _asked(spec, connection, shell, python)
        except (_CannotUse, CommandTimeout):
            raise
        except HostError as error:
            failures.append(error)
    if spec.python and failures:
        raise failures[0]
    if needs_python:
        raise no_python(spec.name, spec.cluster, failures)
    return Machine(spec, connection, shell, found.os, found.home, found.workdir)


class _CannotUse(HostError):
    """The workdir cannot be used, whichever Python runs: no other one is tried."""


def _asked(spec: HostSpec, connection: Connection, shell: Shell, python: str) -> Machine:
    request = {"workdir": spec.workdir or DEFAULT_WORKDIR}
    answer = call(
        connection, python, "host_probe", request, _ANSWER_S, shell=shell, cluster=spec.cluster
    )
    if answer["problem"]:
        raise _CannotUse(
            spec.name,
            f"its folder {answer['workdir']} cannot be used: {answer['problem']}",
            "make room or give the folder to its user, or set `workdir:` in the cluster file",
        )
    return Machine(
        spec,
        connection,
        shell,
        answer["os"],
        answer["home"],
        answer["workdir"],
        answer["executable"],
        answer["cores"],
    )


def _shell(connection: Connection, timeout_s: float) -> Shell:
    try:
        done = connection.run(PROBE, timeout_s=timeout_s)
    except CommandTimeout:
        raise CommandTimeout(
            connection.name,
            f"accepts the login, but its login shell runs no command within {timeout_s:g} s",
            "check what its start-up files (.bashrc, .zshenv) wait for",
        ) from None
    shell = which_shell(done.out.decode("utf-8", "replace"))
    if shell is None:
        raise HostError(
            connection.name,
            f"its login shell runs no commands: {error_tail(done.err, done.out)}",
            "smolrun needs an account with an ordinary shell",
        )
    return shell


def _probe_shell(spec: HostSpec, connection: Connection, shell: Shell) -> ShellAnswer:
    workdir = spec.workdir or DEFAULT_WORKDIR
    if shell is Shell.POSIX:
        script = unix_probe_script(workdir).encode()
        done = connection.run("exec sh -s", data=script, timeout_s=_ANSWER_S)
    else:
        line = command(shell, windows_probe_command(workdir))
        done = connection.run(line, timeout_s=_ANSWER_S)
    found = parse_answer(done.out.decode("utf-8", "replace"))
    if found is None:
        words = error_tail(done.err, done.out)
        raise HostError(connection.name, f"its shell did not answer the probe: {words}")
    return found


_MARK = "smolrun-found"

# In sh's own words; a * stands for any version, and the last one is the newest.
_UNIX = (
    '"$workdir"/envs/*/bin/python',
    '"$HOME"/.local/bin/python3',
    '"$HOME"/.local/share/uv/python/cpython-3*/bin/python3',
    "/opt/homebrew/bin/python3",
    "/usr/local/bin/python3",
    "/usr/bin/python3",
    "/opt/python*/bin/python3",
    "/usr/local/python*/bin/python3",
    "/Library/Frameworks/Python.framework/Versions/3*/bin/python3",
    '"$HOME"/.pyenv/versions/3*/bin/python3',
    '"$HOME"/miniconda3/bin/python3',
    '"$HOME"/miniforge3/bin/python3',
    '"$HOME"/anaconda3/bin/python3',
    "/opt/conda/bin/python3",
    "/run/current-system/sw/bin/python3",
    "/usr/bin/python3.?",
    "/usr/bin/python3.??",
)
# Without the command line tools, Apple's python3 only opens a window that offers to install them.
_UNIX_QUESTION = """\
workdir={workdir}
case $workdir in
  "~/"*) workdir=$HOME/${{workdir#??}} ;;
  /*) ;;
  *) workdir=$HOME/$workdir ;;
esac
echo
echo {mark} os "$(uname -s)"
echo {mark} home "$HOME"
echo {mark} workdir "$workdir"
for python in {places} "$(command -v python3)"; do
  [ -x "$python" ] || continue
  [ "$python" = /usr/bin/python3 ] && [ "$(uname -s)" = Darwin ] &&
    ! xcode-select -p >/dev/null 2>&1 && continue
  echo {mark} python "$python"
done
"""
# No double quotes: PowerShell's versions disagree on how those reach a program.
_WINDOWS_QUESTION = """\
$w = '{workdir}'; if (-not [IO.Path]::IsPathRooted($w)) {{ $w = Join-Path $HOME $w }}; \
'{mark} os Windows'; '{mark} home ' + $HOME; '{mark} workdir ' + $w; \
Get-Item -ErrorAction SilentlyContinue -Path ($w + '\\envs\\*\\Scripts\\python.exe'), \
($env:LOCALAPPDATA + '\\Programs\\Python\\Python3*\\python.exe'), \
($env:APPDATA + '\\uv\\python\\cpython-3*\\python.exe'), \
($env:ProgramFiles + '\\Python3*\\python.exe'), 'C:\\Python3*\\python.exe' | \
ForEach-Object {{ '{mark} python ' + $_.FullName }}; \
if (Get-Command py -ErrorAction SilentlyContinue) \
{{ '{mark} python ' + (py -3 -c 'import sys; print(sys.executable)') }}\
"""


@dataclass
class ShellAnswer:
    """What the shell answered; paths have "/" between their parts on every system."""

    os: str = ""
    home: str = ""
    workdir: str = ""
    pythons: list[str] = field(default_factory=list)


def unix_probe_script(workdir: str) -> str:
    """A script for sh's stdin that lists the system, the folders and the Pythons."""
    return _UNIX_QUESTION.format(mark=_MARK, workdir=shlex.quote(workdir), places=" ".join(_UNIX))


def windows_probe_command(workdir: str) -> list[str]:
    """The same as a command, for cmd.exe and PowerShell. Not run."""
    folder = workdir.removeprefix("~/").replace("'", "''").replace("/", "\\")
    script = _WINDOWS_QUESTION.format(mark=_MARK, workdir=folder)
    return ["powershell", "-NoProfile", "-NonInteractive", "-Command", script]


def parse_answer(output: str) -> ShellAnswer | None:
    """The answer in a shell's output, without other lines; None if there is none."""
    answer = ShellAnswer()
    for line in output.splitlines():
        mark, _, rest = line.strip().partition(" ")
        what, _, value = rest.partition(" ")
        if mark != _MARK or not value:
            continue
        if what == "os":
            answer.os = value.lower()
        elif what == "python":
            answer.pythons.append(_slashed(answer, value))
        elif what in ("home", "workdir"):
            setattr(answer, what, _slashed(answer, value))
    answer.pythons = list(dict.fromkeys(answer.pythons))
    return answer if answer.os and answer.home else None


def _slashed(answer: ShellAnswer, path: str) -> str:
    return path.replace("\\", "/") if answer.os == "windows" else path
