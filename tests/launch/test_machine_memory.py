"""Limits and counts of control groups, both versions, and machines without any."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy
import psutil
import pytest
import torch

from smolrun.launch import local
from smolrun.launch.control import OUT_OF_MEMORY
from smolrun.launch.hosts import WorkerPlan
from smolrun.launch.local import LocalHost
from smolrun.launch.machine_memory import (
    MachineMemory,
    describe_out_of_memory,
    ended_by_linux,
    gb,
    is_out_of_memory,
    machine_memory,
    own_groups,
)
from smolrun.launch.root_cause import RankState, pick_cause
from smolrun.launch.supervisor_events import Exited
from tests.launch.driver_process import TINY_DRIVER
from tests.launch.test_control import START
from tests.launch.test_supervisor import failed, outcome_of, running
from tests.worker.test_process import begin, workers  # noqa: F401  (a fixture)

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
            f"{top}/outer/memory.stat": f"inactive_file {10 * MB}\nactive_file {20 * MB}\n",
        },
    )
    memory = machine_memory(root)
    assert (memory.total, memory.available, memory.kills) == (100 * MB, 50 * MB, 2)


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": str(100 * MB), "sys/fs/cgroup/memory.current": "0"}
    root = machine(tmp_path, "0::/system/docker-1234\n", files)
    assert machine_memory(root).total == 100 * MB


def test_files_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.events": "oom_kill\n"})
    assert machine_memory(root).kills == 0
    root = machine(tmp_path / "uncounted", "0::/\n", {})
    assert machine_memory(root).kills == 3  # of the whole machine


CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB."
)
MPS = RuntimeError(
    "MPS backend out of memory (MPS allocated: 18.00 GB, max allowed: 18.13 GB). Tried to allocate "
    "256.00 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit."
)


def real_errors() -> list[BaseException]:
    errors: list[BaseException] = []
    for ask in (
        lambda: torch.empty(1 << 50),
        lambda: numpy.empty(1 << 50),
        lambda: bytearray(1 << 60),
    ):
        try:
            ask()
        except Exception as error:
            errors.append(error)
    return errors


def test_every_librarys_error_is_known() -> None:
    asked = real_errors()
    assert len(asked) == 3
    others = [CUDA, MPS, OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()]
    assert all(map(is_out_of_memory, [*asked, *others]))


def test_other_errors_are_not() -> None:
    others = [ValueError("out of memory"), RuntimeError("shapes do not fit"), OSError(28, "full")]
    assert not any(map(is_out_of_memory, others))


def test_the_sentence_says_how_much_was_asked_for_and_how_much_there_is() -> None:
    sentence = describe_out_of_memory(real_errors()[0])
    assert sentence.startswith("DefaultCPUAllocator: can't allocate memory: you tried to allocate ")
    assert f"of {gb(machine_memory().total)} free on its host)" in sentence
    assert "used by this rank" in sentence
    assert describe_out_of_memory(CUDA).startswith(
        "CUDA out of memory. Tried to allocate 20.00 GiB ("
    )
    assert "Tried to allocate 256.00 MB on private pool (" in describe_out_of_memory(MPS)
    assert describe_out_of_memory(MemoryError()).startswith("MemoryError (")


def test_a_rank_that_reported_it_is_named_with_it() -> None:
    supervisor = running(2)
    supervisor.handle(failed(1, OUT_OF_MEMORY, "no room (3.1 GB used by this rank)"), 2.0)
    supervisor.handle(failed(0, "PeerLost", "lost rank 1: gone", 1), 2.1)
    supervisor.handle(Exited(0, 3), 2.2)
    outcome = outcome_of(supervisor.handle(Exited(1, 3), 2.2))
    assert outcome.out_of_memory
    assert "ran out of memory before its first step: no room (3.1 GB used" in outcome.reason
    assert outcome.failed_rank == 1


def test_a_rank_that_linux_ended_is_named_with_it_and_others_are_not() -> None:
    reported_by = ended_by_linux(31 * MB * 100, 4096 * MB)
    for note, expected in ((reported_by, True), (None, False)):
        supervisor = running(2)
        supervisor.handle(Exited(1, -9, note), 2.0)
        outcome = outcome_of(supervisor.handle(Exited(0, 3), 2.1))
        assert outcome.out_of_memory == expected
        assert ("may have run out of memory" in outcome.reason) == expected
        assert (reported_by in outcome.reason) == expected


def test_a_protocol_error_stays_the_cause_of_a_rank_that_was_killed_later() -> None:
    state = RankState(0, "local", "log", out_of_memory="killed", exit_code=-9)
    state.problem = "sent a line that is no message"
    cause = pick_cause([state])
    assert not cause.out_of_memory
    assert "broke the control protocol" in cause.reason


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux")
def test_a_real_worker_that_gets_no_more_memory_reports_it(workers: list) -> None:  # type: ignore[type-arg]  # noqa: F811
    worker = begin(workers, "memory")
    worker.join_the_mesh()
    result, code, log = worker.end()
    assert code == 3
    assert result.error is not None
    assert result.error.kind == OUT_OF_MEMORY
    assert result.error.message.startswith("MemoryError (")
    assert "Traceback" in log


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
@pytest.mark.parametrize("is_late", [False, True])
def test_only_what_linux_ends_in_the_last_seconds_may_be_the_worker(
    monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    kills = [0]
    memory = machine_memory()
    monkeypatch.setattr(local, "machine_memory", lambda: replace(memory, kills=kills[0]))
    monkeypatch.setattr(local, "_COUNT_EVERY_S", 0.0)
    worker = LocalHost(["sh", "-c", "echo 1; read line; echo 2; read line; echo 3; read line"])
    process = worker.start(WorkerPlan(START, Path("log")))
    kills[0] = 1  # of another process
    for _ in range(2):
        assert process.read_control()
        process.write(b"\n")
    assert process.read_control()
    kills[0] += is_late
    process.kill()
    assert process.wait() == -9
    reason = process.out_of_memory()
    assert (reason is not None) == is_late
    assert reason is None or f"of {gb(memory.total)} there" in reason


@contextmanager
def limited_group(size: int, name: str = "") -> Iterator[Path]:
    """A control group inside our own with so many bytes of memory; skips where there is none."""
    for own in own_groups(Path("/")):
        group = own / f"smolrun-test-{os.getpid()}{name}"
        limits = [group / "memory.limit_in_bytes", group / "memory.max"]
        try:
            group.mkdir()
        except OSError:
            continue
        if limit := next((path for path in limits if path.exists()), None):
            limit.write_text(str(size))
            try:
                yield group
            finally:
                group.rmdir()
            return
        group.rmdir()
    pytest.skip("needs Linux, and the right to make a memory control group")


def test_linux_ends_a_real_worker_and_the_driver_says_so(tmp_path: Path) -> None:
    options = json.dumps({"folder": str(tmp_path), "behave": {"1": "hoard"}, "steps": 10_000})
    command = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    with limited_group(200 << 20) as group:
        driver = subprocess.run(
            ["sh", "-c", command, str(group), sys.executable, str(TINY_DRIVER), options],
            capture_output=True,
            text=True,
            timeout=50,
        )
    assert driver.returncode == 3, driver.stderr
    reason = json.loads(driver.stdout)["reason"]
    assert reason.startswith("rank 1 on local may have run out of memory at step 2: Linux was ")
    used = int(reason.split("it had ")[1].split(" MB")[0])
    assert 50 <= used <= 200
    assert "of 200 MB there" in reason


@pytest.mark.parametrize(("total", "limit"), [(64, 59), (20, 15), (16, 12), (8, 6), (4, 3)])
def test_people_keep_5_gb_of_a_host_or_a_quarter_of_a_small_one(total: int, limit: int) -> None:
    memory = MachineMemory(total * 2**30, 2 * 2**30, 0)
    assert (memory.limit, memory.room) == (limit * 2**30, 2 * 2**30)
    assert MachineMemory(total * 2**30, total * 2**30, 0).room == limit * 2**30


def test_a_control_group_for_the_run_is_not_shared_with_people() -> None:
    assert MachineMemory(4 * 2**30, 4 * 2**30, 0, physical=64 * 2**30).limit == 4 * 2**30
    assert machine_memory().physical == psutil.virtual_memory().total
