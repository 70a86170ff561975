"""What a host has before setup, and what setup has to do there, decided first. Pure.

    blank_host_script(...) -> sh for its stdin, as it may have no Python;  parse_blank_host(output)
    plan(host, found, ...) -> Plan | None

A host that has what it needs has an empty plan; one that cannot be made ready is refused with a
sentence that says what its user must do.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from smolrun.errors import HostError

OLDEST, NEWEST = (3, 11), (3, 13)  # those that torch has wheels for
_LIKED = (3, 12)
_CPU_BYTES, _CUDA_BYTES = 3_000_000_000, 9_000_000_000  # an environment, and pip's own copies
_SMALL_BYTES = 100_000_000
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Plan:
    """How the environment is made: by which Python (None: uv fetches `version`), with which torch.

    `brings_uv`: our copy of uv goes there first. `torch`: cpu or cuda, or default, which is what
    the index has.
    """

    host: str
    environment: str
    python: str | None
    version: str
    has_pip: bool
    uv: str | None
    brings_uv: bool
    torch: str
    requirements: tuple[str, ...]

    def lines(self) -> list[str]:
        """What will be done, in the order in which it will."""
        lines = []
        if self.brings_uv:
            lines.append("copy uv there (no root, only into its workdir)")
        if self.python is None:
            lines.append(f"install Python {self.version} by uv, for its user alone")
        by = f"Python {self.version}" if self.python is None else self.python
        lines.append(f"make the environment {self.environment} by {by}")
        build = {"cpu": " with the CPU build of torch", "cuda": " with the CUDA build of torch"}
        count = len(self.requirements)
        lines.append(f"install {count} packages and what they need{build.get(self.torch, '')}")
        return lines


def plan(
    host: str,
    found: BlankHost,
    environment: str,
    *,
    torch: str,
    requirements: Sequence[str],
    workdir: str,
) -> Plan | None:
    """What to do on this host, None for nothing; HostError where it cannot be set up."""
    if found.has_environment:
        return None
    _refuse(host, found, workdir)
    build = _build(found, torch)
    _check_room(host, found, build, requirements, workdir)
    python = _python(found, workdir)
    return Plan(
        host=host,
        environment=environment,
        python=python[1] if python else None,
        version=".".join(map(str, python[0] if python else _LIKED)),
        has_pip=bool(python and python[2]),
        uv=found.uv,
        brings_uv=found.uv is None,
        torch=build,
        requirements=tuple(requirements),
    )


def _refuse(host: str, found: BlankHost, workdir: str) -> None:
    if found.system not in ("linux", "darwin"):
        raise HostError(
            host,
            f"task=setup supports Linux and macOS, this is {found.system or 'neither'}",
            "install Python 3.12 and `pip install smolrun` there, and set `python:` to it",
        )
    if found.bits == 32 or found.architecture in ("armv6l", "armv7l", "i686", "i386"):
        raise HostError(
            host,
            f"a 32-bit system ({found.architecture}), for which there is no torch",
            "write a 64-bit system to its disk: Raspberry Pi OS (64-bit) runs on a Pi 3, 4 and 5",
        )
    if found.is_jetson:
        raise HostError(
            host,
            "a Jetson needs NVIDIA's own build of torch, which is on no package index",
            "install that (docs of its JetPack), then set `python:` of that host to its Python",
        )
    if not found.is_writable:
        raise HostError(host, f"no folder can be made at {workdir}", "set `workdir:` of that host")


def _build(found: BlankHost, torch: str) -> str:
    if found.system == "darwin":
        return "default"
    if torch == "auto":
        return "cuda" if found.has_nvidia else "cpu"
    return torch


def _check_room(
    host: str, found: BlankHost, build: str, requirements: Sequence[str], workdir: str
) -> None:
    has_torch = any(line.startswith("torch") for line in requirements)
    needed = (_CUDA_BYTES if build == "cuda" else _CPU_BYTES) if has_torch else _SMALL_BYTES
    if found.free is not None and found.free < needed:
        raise HostError(
            host,
            f"{found.free / 1e9:.1f} GB free at {workdir}, the environment takes {needed / 1e9:g}",
            "free some, or set `workdir:` of that host to another disk",
        )


def _python(found: BlankHost, workdir: str) -> tuple[tuple[int, ...], str, bool] | None:
    """The best that is there; one of our own environments is none."""
    good = [
        one
        for one in found.pythons
        if OLDEST <= one[0] <= NEWEST and not one[1].startswith(f"{workdir}/envs/")
    ]
    # Whole ones first: a bare one needs uv to make an environment with pip.
    return min(good, key=lambda one: (not one[2], one[0] != _LIKED, one[0]), default=None)


UV_VERSION = "0.13.9"  # the copy that task=setup brings; its hashes are in environment_maker.py
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
class BlankHost:
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


def parse_blank_host(output: str) -> BlankHost:
    """What the host answered; other lines of its shell are ignored."""
    found = BlankHost()
    for line in output.splitlines():
        mark, _, rest = line.partition(" ")
        what, _, value = rest.partition(" ")
        if mark == _MARK and value.strip():
            with contextlib.suppress(IndexError, ValueError):  # a malformed line is ignored
                _take(found, what, value)
    return found


def _take(found: BlankHost, what: str, value: str) -> None:
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
