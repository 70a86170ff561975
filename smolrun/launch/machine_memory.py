"""How much memory this machine has for us, and whether Linux has ended processes for lack of it.

A container or a service manager may give a process less than the machine has: Linux keeps such
limits, and counts of its kills, in control groups. Reads files of /proc and /sys where they are,
and knows nothing of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# The files of a control group, version 2 and version 1: limit, in use, events.
_FILES = (
    ("memory.max", "memory.current", "memory.events"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"),
)


@dataclass(frozen=True)
class MachineMemory:
    """In bytes. `kills` only ever grows: processes that Linux ended because memory was full, on
    this machine and in our control group; 0 where nobody counts."""

    total: int
    available: int
    kills: int


def machine_memory(root: Path = Path("/")) -> MachineMemory:
    """The machine's memory, or what our control group leaves of it. `root` is for tests."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    kills = _count(root / "proc/vmstat")
    for group in own_groups(root):
        for limit_file, used_file, events_file in _FILES:
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and limit < total:
                total = limit
                # Pages of files count as used, but are let go when others need the room.
                cache = _field(group / "memory.stat", "inactive_file")
                available = min(available, max(0, limit - (used or 0) + cache))
            kills += _count(group / events_file)
    return MachineMemory(total, available, kills)


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


def _field(path: Path, name: str) -> int:
    """The number behind a name in a file of such lines; 0 where there is none."""
    try:
        fields = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0
