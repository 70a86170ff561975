"""How a command is written as one line for the shell of another machine. Pure.

An SSH server gives the line to the user's login shell, whatever that is. On Unix the line therefore
says as little as possible to that shell: `exec sh -c '...'` means the same in bash, zsh, dash, ksh,
fish and csh (which must have it on one line: what has several goes to stdin). cmd.exe and
PowerShell follow their documented rules.
Not run: cmd.exe and PowerShell; the tests know their rules, no Windows machine has seen them.

Nothing secret may be in a line: every user of that machine can read it in the list of processes.
So on Unix the values of variables are no part of it: `sh` reads them from stdin, a line each,
before the command begins (`environment_input`). On Windows they are in the line, which there only
the same user and administrators can read.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from enum import Enum

# Harmless everywhere: sh leaves %OS% alone, cmd.exe puts Windows_NT there, and PowerShell's echo
# writes each word on a line of its own.
PROBE = "echo smolrun-probe %OS%"
_ANSWER = re.compile(r"smolrun-probe(\s+)(\S+)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_CMD_SPECIAL = re.compile(r'([()%!^"<>&|])')


class Shell(Enum):
    """Whose rules a line follows."""

    POSIX = "sh"
    CMD = "cmd.exe"
    POWERSHELL = "PowerShell"


def which_shell(output: str) -> Shell | None:
    """The shell that answered PROBE, other lines before the answer ignored; None without one."""
    answers = _ANSWER.findall(output)
    if not answers:
        return None
    space, word = answers[-1]
    if "\n" in space:
        return Shell.POWERSHELL
    return Shell.POSIX if word == "%OS%" else Shell.CMD


def command(
    shell: Shell,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> str:
    """The line that runs `argv` in folder `cwd` with these variables added; the first of its input
    has to be `environment_input(shell, env)`.

    ValueError for what no quoting can bring through that shell.
    """
    if not argv or not argv[0] or argv[0].startswith("-"):
        raise ValueError(f"no command: {list(argv)!r}")
    env = env or {}
    for text in (*argv, cwd or ""):
        _refuse(text, "\0" if shell is Shell.POSIX else "\0\r\n")
    for name, value in env.items():
        if set(value) & set("\0\r\n"):
            raise ValueError(f"the value of the variable {name} has more than one line")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a variable")
    if shell is Shell.POSIX:
        return script(posix(argv, env=env, cwd=cwd))
    if shell is Shell.CMD:
        return _cmd(argv, env, cwd)
    return _powershell(argv, env, cwd)


def script(text: str) -> str:
    """The line that makes any Unix login shell run a piece of sh; it then is sh's own process."""
    # Even between single quotes csh takes ! for a word of its history; only \! is one everywhere.
    quoted = shlex.quote(text).replace("!", r"'\!'")
    return f"exec sh -c {quoted}"


def posix(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> str:
    """`argv` in sh's own words, to be part of a longer piece of sh; see `command` for `env`."""
    # POSIX has `read` take not one byte more than its line, so the rest is the command's own.
    reads = [f"IFS= read -r {name} && export {name}" for name in env or {}]
    # CDPATH= : with it set, cd prints where it went.
    folder = [f"CDPATH= cd -- {shlex.quote(cwd)}"] if cwd is not None else []
    return " && ".join([*reads, *folder, shlex.join(argv)])


def environment_input(shell: Shell, env: Mapping[str, str]) -> bytes:
    """What the line of `command` reads from its stdin before anything else."""
    if shell is not Shell.POSIX:
        return b""
    return "".join(f"{value}\n" for value in env.values()).encode("utf-8", "surrogateescape")


def _cmd(argv: Sequence[str], env: Mapping[str, str], cwd: str | None) -> str:
    # A caret before everything special, quotes included: so cmd.exe never believes itself inside
    # quotes, and the carets hold everywhere. ^%NAME^% names a variable that there is not.
    parts = [f"set {name}={_careted(value)}&&" for name, value in env.items()]
    if cwd is not None:
        parts.append(f"cd /d {_careted(subprocess.list2cmdline([_backslashed(cwd)]))}&&")
    line = subprocess.list2cmdline([_backslashed(argv[0]), *argv[1:]])
    return " ".join([*parts, _careted(line)])


def _careted(text: str) -> str:
    return _CMD_SPECIAL.sub(r"^\1", text)


def _backslashed(path: str) -> str:
    return path.replace("/", "\\")


def _powershell(argv: Sequence[str], env: Mapping[str, str], cwd: str | None) -> str:
    # Windows PowerShell and PowerShell 7 hand double quotes on to programs in different ways.
    for word in argv:
        _refuse(word, '"')
    parts = [f"$env:{name} = {_single(value)};" for name, value in env.items()]
    if cwd is not None:
        parts.append(f"Set-Location -LiteralPath {_single(cwd)};")
    parts.append("& " + " ".join(_single(word) for word in argv) + ";")
    return " ".join([*parts, "exit $LASTEXITCODE"])


def _single(text: str) -> str:
    # PowerShell takes typographic quotes for quotes, too.
    return "'" + re.sub("(['\u2018\u2019\u201a\u201b])", r"\1\1", text) + "'"


def _refuse(text: str, characters: str) -> None:
    if found := set(text) & set(characters):
        raise ValueError(
            f"{text!r} has {found.pop()!r} in it, which cannot be quoted for that shell"
        )
