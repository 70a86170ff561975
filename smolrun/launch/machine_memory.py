"""How much memory this machine has for a run, OOM kills by Linux, and out-of-memory errors.

A container or a service manager may give a process less than the machine has: Linux keeps such
limits, and counts of its kills, in control groups. Reads files of /proc and /sys where they are,
and knows no torch: errors are recognised by names and texts, so that nothing has to be
imported when there is no memory left.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# The files of a control group, version 2 and version 1: limit, in use, events.
_FILES = (
    ("memory.max", "memory.current", "memory.events"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"),
)


_GB = 2**30
_FOR_OTHERS = 5 * _GB


@dataclass(frozen=True)
class MachineMemory:
    """In bytes. `kills` only ever grows: processes of our control group that Linux ended because
    memory was full, or of the machine where groups are not counted; 0 where nothing is. `physical`
    is what the machine has, where `total` is what our control group may use of it."""

    total: int
    available: int
    kills: int
    physical: int = 0

    @property
    def limit(self) -> int:
        """What a run may use here unless the cluster file says otherwise."""
        return min(self.total, default_limit(self.physical or self.total))

    @property
    def room(self) -> int:
        """What a run may use of that now."""
        return min(self.available, self.limit)


def default_limit(total: int) -> int:
    """What a run may use of a machine's memory: people work on it, so their programs and the system
    keep 5 GB, or a quarter of a small machine."""
    return total - min(_FOR_OTHERS, total // 4)


def machine_memory(root: Path = Path("/")) -> MachineMemory:
    """The machine's memory, or what our control group leaves of it. `root` is for tests."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    kills = None
    for group in own_groups(root):
        for limit_file, used_file, events_file in _FILES:
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and limit < total:
                total = limit
                # Pages of files count as used, but are let go when others need the room.
                cache = _field(group / "memory.stat", "inactive_file", "active_file")
                available = min(available, max(0, limit - (used or 0) + cache))
            if kills is None and (group / events_file).exists():
                kills = _count(group / events_file)
    kills = _count(root / "proc/vmstat") if kills is None else kills
    return MachineMemory(total, available, kills, machine.total)


def own_groups(root: Path) -> Iterator[Path]:
    """The folders of the control groups we are in, from the innermost up."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        # In a container the path may be the outer one, while the folders are those seen inside.
        folder = top / path.strip("/")
        folder = folder if folder.is_dir() else top
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _count(path: Path) -> int:
    return _field(path, "oom_kill")


def _field(path: Path, *names: str) -> int:
    """The sum of the numbers behind names in a file of such lines; 0 where there are none."""
    try:
        fields = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
        return sum(int(fields.get(name, 0)) for name in names)
    except (OSError, ValueError):
        return 0


_TYPES = frozenset({"MemoryError", "OutOfMemoryError", "_ArrayMemoryError"})
_TEXTS = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # torch's allocator on the CPU
    "not enough memory",  # the same on Windows
    "alloc_failed",  # cuBLAS, cuDNN
    "bad_alloc",
    "cannot allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error means that memory, of the machine or of a device, is full."""
    if any(kind.__name__ in _TYPES for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


def describe_out_of_memory(error: BaseException) -> str:
    """The error's own sentence, and how much memory is used and free."""
    figures = [f"{gb(psutil.Process().memory_info().rss)} used by this rank"]
    memory = machine_memory()
    figures.append(f"{gb(memory.available)} of {gb(memory.total)} free on its host")
    figures += _device()
    return f"{_words(error)} ({', '.join(figures)})"


def ended_by_linux(used: int, total: int) -> str:
    """The sentence about a process that was killed when the OOM killer ended some, perhaps it: the
    system does not say which."""
    had = f"it had {gb(used)} " if used else ""
    return f"Linux was ending processes because memory was full ({had}of {gb(total)} there)"


def gb(size: float) -> str:
    """As text, in powers of 1024: 15.6 GB."""
    return f"{size / _GB:.1f} GB" if size >= 0.95 * _GB else f"{size / 2**20:.0f} MB"


def _words(error: BaseException) -> str:
    """The sentence that says it, and the next one, which says how much was requested."""
    sentences = re.split(r"(?<=\.)\s+", str(error).strip()) if str(error).strip() else []
    says = [any(text in sentence.lower() for text in _TEXTS) for sentence in sentences]
    first = says.index(True) if any(says) else 0
    return " ".join(sentences[first : first + 2]).rstrip(".") or type(error).__name__


def _device() -> list[str]:
    """Of a CUDA device, if this process uses one."""
    torch: Any = sys.modules.get("torch")
    with contextlib.suppress(Exception):  # a device in trouble may answer nothing any more
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            return [f"{gb(free)} of {gb(total)} free on its GPU"]
    return []
