"""Limits and counts of control groups, both versions, and machines without any."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from smolrun.launch.machine_memory import machine_memory

MB = 1 << 20


def machine(root: Path, cgroup: str, files: dict[str, str], kills: int = 3) -> Path:
    for path, text in {
        "proc/vmstat": f"nr_free_pages 1\noom_kill {kills}\n",
        "proc/self/cgroup": cgroup,
        **files,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    memory = machine_memory(tmp_path)
    assert memory.total == psutil.virtual_memory().total
    assert 0 < memory.available <= memory.total
    assert memory.kills == 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path, version: int) -> None:
    if version == 1:
        cgroup, top = "3:cpuset:/other\n4:memory:/outer/inner\n0::/\n", "sys/fs/cgroup/memory"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control")
        endless = str(2**63 - 4096)
    else:
        cgroup, top = "0::/outer/inner\n", "sys/fs/cgroup"
        names = ("memory.max", "memory.current", "memory.events")
        endless = "max"
    limit, used, events = names
    root = machine(
        tmp_path,
        cgroup,
        {
            f"{top}/outer/inner/{limit}": endless,
            f"{top}/outer/inner/{used}": str(70 * MB),
            f"{top}/outer/inner/{events}": "low 0\noom_kill 2\n",
            f"{top}/outer/{limit}": str(100 * MB),
            f"{top}/outer/{used}": str(80 * MB),
            f"{top}/outer/memory.stat": f"inactive_file {30 * MB}\n",
        },
    )
    memory = machine_memory(root)
    assert (memory.total, memory.available, memory.kills) == (100 * MB, 50 * MB, 5)


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": str(100 * MB), "sys/fs/cgroup/memory.current": "0"}
    root = machine(tmp_path, "0::/system/docker-1234\n", files)
    assert machine_memory(root).total == 100 * MB


def test_files_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.events": "oom_kill\n"})
    assert machine_memory(root).kills == 3
