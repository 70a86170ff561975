"""What a host has before it is set up: asked in plain sh, as it may have no Python. Pure.

question(...) -> a piece of sh for its stdin        understood(output) -> Blank
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

UV_VERSION = "0.13.9"  # the copy that task=setup brings; its hashes are in uv_program.py
_MARK = "smolrun-blank"
_UV = (
    '"$HOME"/.local/bin/uv',
    '"$HOME"/.cargo/bin/uv',
    "/opt/homebrew/bin/uv",
    "/usr/local/bin/uv",
)

# The disk is that of the nearest folder above the workdir that is there.
_QUESTION = """\
workdir={workdir}
say() {{ echo "{mark} $*"; }}
echo
say system "$(uname -s)" "$(uname -m)" "$(getconf LONG_BIT 2>/dev/null)"
if ls /lib/ld-musl-* >/dev/null 2>&1; then say libc musl
else say libc "$(getconf GNU_LIBC_VERSION 2>/dev/null)"; fi
for uv in "$workdir"/bin/uv-{version} {uv} "$(command -v uv)"; do
  [ -x "$uv" ] && "$uv" --version >/dev/null 2>&1 && say uv "$uv" && break
done
for python in {pythons}; do
  told=$("$python" -I -c 'import sys, venv, ensurepip; print("whole", sys.version.split()[0])' \\
    2>/dev/null) ||
  told=$("$python" -I -c 'import sys; print("bare", sys.version.split()[0])' 2>/dev/null) ||
    continue
  say python $told "$python"
done
if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; then say nvidia yes; fi
[ -e /etc/nv_tegra_release ] && say jetson yes
place=$workdir
while [ ! -d "$place" ] && [ "$place" != / ]; do place=$(dirname "$place"); done
say free "$(df -Pk "$place" | awk 'NR==2 {{print $4}}')"
[ -w "$place" ] && say writable "$place"
[ -x {environment}/bin/python ] && say environment yes
exit 0
"""


@dataclass
class Blank:
    """`pythons` are (version, path, has venv and pip); `free` is bytes on the workdir's disk."""

    system: str = ""
    architecture: str = ""
    bits: int = 64
    libc: str = ""
    uv: str | None = None
    pythons: list[tuple[tuple[int, ...], str, bool]] = field(default_factory=list)
    has_nvidia: bool = False
    is_jetson: bool = False
    free: int | None = None
    is_writable: bool = False
    has_environment: bool = False


def question(workdir: str, environment: str, pythons: Sequence[str]) -> str:
    """The piece of sh; all paths are absolute."""
    return _QUESTION.format(
        mark=_MARK,
        workdir=shlex.quote(workdir),
        environment=shlex.quote(environment),
        pythons=" ".join(map(shlex.quote, pythons)) or '""',
        uv=" ".join(_UV),
        version=UV_VERSION,
    )


def understood(output: str) -> Blank:
    """What the host said; noise of its shell is left out."""
    found = Blank()
    for line in output.splitlines():
        mark, _, rest = line.partition(" ")
        what, _, value = rest.partition(" ")
        if mark == _MARK and value.strip():
            with contextlib.suppress(IndexError, ValueError):  # said nothing that can be used
                _take(found, what, value)
    return found


def _take(found: Blank, what: str, value: str) -> None:
    words = value.split()
    if what == "system":
        found.system, found.architecture = words[0].lower(), words[1]
        found.bits = int(words[2]) if len(words) > 2 and words[2].isdigit() else 64
    elif what == "python" and len(words) >= 3:
        version = tuple(int(part) for part in words[1].split(".")[:2] if part.isdigit())
        found.pythons.append((version, value.split(" ", 2)[2], words[0] == "whole"))
    elif what == "free":
        found.free = int(words[0]) * 1024 if words[0].isdigit() else None
    elif what in ("libc", "uv"):
        setattr(found, what, value)
    elif what in ("nvidia", "jetson", "environment", "writable"):
        names = {"nvidia": "has_nvidia", "jetson": "is_jetson", "writable": "is_writable"}
        setattr(found, names.get(what, "has_environment"), True)
