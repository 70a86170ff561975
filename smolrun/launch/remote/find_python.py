"""Where a host may have a Python: the question to its shell, and what the answer means. Pure.

The shell of a command over SSH reads no profile, so a Python that its user has on the PATH is not
found by name: the places where installers put it are looked at one by one.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

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
class Answer:
    """What the shell said; paths have "/" between their parts on every system."""

    os: str = ""
    home: str = ""
    workdir: str = ""
    pythons: list[str] = field(default_factory=list)


def unix_question(workdir: str) -> str:
    """A piece of sh that says what is there, for sh's stdin."""
    return _UNIX_QUESTION.format(mark=_MARK, workdir=shlex.quote(workdir), places=" ".join(_UNIX))


def windows_question(workdir: str) -> list[str]:
    """The same as a command, for cmd.exe and PowerShell. Not run."""
    folder = workdir.removeprefix("~/").replace("'", "''").replace("/", "\\")
    script = _WINDOWS_QUESTION.format(mark=_MARK, workdir=folder)
    return ["powershell", "-NoProfile", "-NonInteractive", "-Command", script]


def understood(output: str) -> Answer | None:
    """The answer in a shell's output, noise left out; None if there is none."""
    answer = Answer()
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


def _slashed(answer: Answer, path: str) -> str:
    return path.replace("\\", "/") if answer.os == "windows" else path
