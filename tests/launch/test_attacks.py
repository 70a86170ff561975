"""A worker that an attacker owns: what it may say, and how much. Nothing of it ends the driver, and
each violation names that worker."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolrun.events import Event, Note, RankStep
from smolrun.launch import streams
from smolrun.launch.control import Address, LogMessage, ReadyMessage, ResultMessage, encode
from smolrun.launch.driver import InputQueue
from smolrun.launch.supervisor_events import HostSilent, Input, ProtocolViolation, Reported
from smolrun.launch.worker_monitor import WorkerMonitor
from tests.launch.scripted_worker import ScriptedHost, ScriptedWorker, event, ready, run
from tests.launch.tiny_driver import plans
from tests.waiting import until

RANK_STEP: dict[str, Any] = {
    "step": 0, "rank": 1, "compute_s": 0.1, "wait_s": 0.0, "waited_for": None, "bytes_sent": 0,
    "bytes_received": 0,
}  # fmt: skip
STEP: dict[str, Any] = {
    "step": 0, "time_s": 1.0, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 8,
    "tokens_per_s": 8.0, "bytes_sent": 0, "bytes_received": 0, "compute_s": 0.1, "wait_s": 0.0,
}  # fmt: skip
MEMBERSHIP: dict[str, Any] = {"step": 0, "is_here": False, "reason": "left", "tickets": 0}
CHECKPOINT: dict[str, Any] = {
    "step": 0, "folder": "../../../etc", "bytes": 1, "waited_s": 0.0, "write_s": 0.0
}  # fmt: skip
SHA256 = "0" * 64


def shard(*names: str, rank: int = 1, reporter: int | None = None, **fields: Any) -> bytes:
    files = {name: {"bytes": 10, "sha256": SHA256} for name in names}
    report = {"rank": rank if reporter is None else reporter, "files": files, "tensors": {}}
    given = {"state": {}, "report": report, **fields}
    return event("shard_saved", updates=3, rank=rank, waited_s=0.0, write_s=0.0, **given)


def attended(
    rank: int, worker: ScriptedWorker, folder: Path, posted: queue.SimpleQueue[Input]
) -> WorkerMonitor:
    """The driver's end of a worker that has rank `rank` of 2."""
    plan = plans(folder, {}, ranks=2, steps=3)[rank]
    return WorkerMonitor(plan, ScriptedHost({rank: worker}), lambda item, _: posted.put(item))


def heard(rank: int, lines: Iterable[bytes], folder: Path) -> list[Input]:
    """What the driver makes of the lines of rank `rank` of 2, up to the first violation."""
    posted: queue.SimpleQueue[Input] = queue.SimpleQueue()
    monitor = attended(rank, ScriptedWorker([*lines, b"end\n"]), folder, posted)
    monitor.begin()
    got: list[Input] = []
    try:
        while not got or not isinstance(got[-1], ProtocolViolation):
            got.append(posted.get(timeout=10.0))
    finally:
        monitor.kill()
        assert monitor.join(10.0)
    return got


def violation(rank: int, line: bytes, folder: Path) -> str:
    """Why this line of this rank is refused; "" if it is not."""
    *fine, misbehaved = heard(rank, [line], folder)
    assert isinstance(misbehaved, ProtocolViolation) and misbehaved.rank == rank
    return "" if fine else misbehaved.problem


@pytest.mark.parametrize(
    ("rank", "line", "reason"),
    [
        # Types and ranges.
        (1, event("rank_step", **RANK_STEP | {"step": "x"}), "Expected `int`, got `str`"),
        (1, event("rank_step", **RANK_STEP | {"step": -4}), "Expected `int` >= 0"),
        (1, event("rank_step", **RANK_STEP | {"wait_s": -1.0}), "Expected `float` >= 0.0"),
        (1, event("rank_step", **RANK_STEP | {"wait_s": 1e300}), "Expected `float` <= 1e"),
        (1, event("rank_step", **RANK_STEP | {"bytes_sent": 1 << 60}), "Expected `int` <="),
        (1, event("rank_step", **RANK_STEP | {"waited_for": 7}), "rank 7, which does not exist"),
        (1, event("rank_step", step=0), "missing required field"),
        (1, event("rank_step", **RANK_STEP, more=1), "unknown field `more`"),
        (1, event("party"), "Invalid value 'party'"),
        (0, event("step", **STEP | {"loss": "x"}), "Expected `float | null`"),
        (0, event("step", **STEP, rank=1), "Expected `null`"),
        (0, event("norms", step=0, gradients={"head": "x"}), "Expected `float | null`"),
        (0, event("step_skipped", step=0, ranks=[9]), "rank 9, which does not exist"),
        (0, event("bench", row={"op": 3}), "Expected `str`"),
        (0, event("bench", row={"op": "x" * 101}), "Expected `str` of length <= 100"),
        (1, event("timeline", step=0, rank=1, spans=[["a", "wait", 0]]), "Expected `array`"),
        (1, event("note", level="fatal", message="", rank=1), "Invalid enum value 'fatal'"),
        # Speaking for others.
        (1, event("step", **STEP), "only rank 0 may send"),
        (1, event("eval", step=0, loss=0.0, tokens=1), "only rank 0 may send"),
        (1, event("rank_step", **RANK_STEP | {"rank": 0}), "only rank 0 may send"),
        (0, event("rank_step", **RANK_STEP), "only rank 1 may send"),
        (1, event("note", level="info", message="all is well"), "only rank 0 may send"),
        (1, event("gradient_dropped", step=0, rank=1, so_far=1), "only rank 0 may send"),
        (1, event("membership", **MEMBERSHIP, rank=1), "only rank 0 may send"),
        (0, event("membership", **MEMBERSHIP, rank=9), "rank 9, which does not exist"),
        (0, event("checkpoint", **CHECKPOINT), "only the driver may send"),
        (1, event("checkpoint", **CHECKPOINT), "only the driver may send"),
        # Checkpoints: the files of others, files elsewhere, the state of the whole run.
        (1, shard("rank0-0.safetensors"), "is not a file of rank 1"),
        (1, shard("../../../etc/passwd"), "is not the name of a checkpoint file"),
        (1, shard(reporter=0), "reports what rank 0 saved"),
        (1, shard(rank=0), "only rank 0 may send"),
        (1, shard(state={"run": {}}), "state of the whole run"),
        (0, shard(rank=0, state={"run": []}), "Expected `object`"),
        (0, shard(rank=0, state={"driver": {}}), "Invalid enum value 'driver'"),
        (1, shard(report={}), "a report of a rank's saved files is damaged"),
        # What is no event.
        (1, ready(0), "says that it is rank 0"),
        (1, b'{"type":"ready","rank":1,"addresses":[],"pid":1,"versions":{}}\n', "length >= 1"),
        (1, b'{"type":"task","topic":"%s","data":{}}\n' % (b"x" * 101), "length <= 100"),
        (1, b'{"type":"task","topic":"stream"}\n', "missing required field `data`"),
        (1, b'{"type":"task","topic":"stream","data":[}\n', "is no message"),
        (1, b'{"type":"task","topic":"a","data":"%s"}\n' % (b"x" * (1 << 20)), "1048576 bytes"),
        (1, b'{"type":"task","topic":"a","data":{},"rank":0}\n', "unknown field `rank`"),
        (1, b'{"type":"result","status":"done","summary":{"peak_memory_bytes":"x"}}\n', "Expected"),
        (1, b'{"type":"log","level":"info","message":"%s"}\n' % (b"x" * 70_000), "length <= 65536"),
    ],
)  # fmt: skip
def test_a_worker_may_not_send_this(rank: int, line: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in violation(rank, line, tmp_path)


@pytest.mark.parametrize(
    ("rank", "line"),
    [
        (1, event("rank_step", **RANK_STEP)),
        (1, event("rank_step", **RANK_STEP | {"wait_s": 0, "temperature_c": -4.5})),
        (0, event("step", **STEP | {"loss": None, "grad_norm": None})),
        (0, event("eval", step=0, loss=None, tokens=1)),
        (0, event("norms", step=0, gradients={"head": None})),
        (0, event("membership", **MEMBERSHIP, rank=1)),
        (0, event("gradient_dropped", step=0, rank=1, so_far=1)),
        (1, event("note", level="info", message="hot", rank=1)),
        (1, shard("rank1-0.safetensors", state={})),
        (0, shard("rank0-0.safetensors", rank=0, state={"run": {"training": {}}})),
        (1, encode(ResultMessage(status="done", summary={"peak_memory_bytes": 8, "more": [1]}))),
    ],
)
def test_and_it_may_send_this(rank: int, line: bytes, tmp_path: Path) -> None:
    assert violation(rank, line, tmp_path) == ""


def test_others_are_not_sent_to_addresses_that_a_worker_was_not_given(tmp_path: Path) -> None:
    elsewhere = ReadyMessage(rank=1, addresses=[Address("192.0.2.1", 22)], pid=1, versions={})
    assert "an address that it was not given" in violation(1, encode(elsewhere), tmp_path)


def test_a_violation_ends_the_run_and_names_rank_and_host(tmp_path: Path) -> None:
    events: list[Event] = []
    lines = [
        ready(1),
        event("rank_step", **RANK_STEP),
        event("rank_step", **RANK_STEP | {"step": "x"}),
    ]
    outcome = run(tmp_path, {1: ScriptedWorker(lines)}, events=events)
    assert (outcome.exit_code, outcome.failed_rank, outcome.failed_host) == (3, 1, "local")
    assert outcome.reason.startswith("rank 1 on local broke the control protocol: it sent a line")
    assert not outcome.is_lost, "another start would not go better"
    assert events == [RankStep(0, 1, 0.1, 0.0, None, 0, 0)]
    assert isinstance(heard(1, [lines[1]], tmp_path)[0], Reported)


def test_a_worker_is_ready_once(tmp_path: Path) -> None:
    outcome = run(tmp_path, {1: ScriptedWorker([ready(1), ready(1)])})
    assert (outcome.exit_code, outcome.failed_rank) == (3, 1)


def test_lines_that_wait_are_limited_in_bytes_not_in_number() -> None:
    inbox = InputQueue(most_bytes=10_000)
    item = HostSilent(1)
    assert inbox.put(item, 1_000_000, timeout_s=0), "one line of any length is accepted"
    assert not inbox.put(item, 0, timeout_s=0)
    assert inbox.get(0) is item
    num_small = 0
    while inbox.put(item, 100, timeout_s=0):
        num_small += 1
    assert 5 < num_small < 100, "an input without a line takes memory too"
    while inbox.get(0) is not None:
        num_small -= 1
    assert num_small == 0


def test_the_driver_counts_the_bytes_of_each_line(tmp_path: Path) -> None:
    sizes: queue.SimpleQueue[tuple[Input, int]] = queue.SimpleQueue()
    line = event("note", level="info", message="x" * 10_000, rank=1)
    plan = plans(tmp_path, {}, ranks=2, steps=3)[1]
    monitor = WorkerMonitor(
        plan, ScriptedHost({1: ScriptedWorker([line])}), lambda *one: sizes.put(one)
    )
    monitor.begin()
    item, num_bytes = sizes.get(timeout=10.0)
    monitor.kill()
    assert monitor.join(10.0)
    assert isinstance(item, Reported) and num_bytes == len(line) - 1


def test_a_worker_with_endless_messages_is_shown_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolrun.launch.worker_monitor._MOST_NOTES", 3)
    log = encode(LogMessage(level="info", message="still here"))
    *notes, step, _ = heard(1, [log] * 500 + [event("rank_step", **RANK_STEP)], tmp_path)
    assert [type(item.event) for item in notes if isinstance(item, Reported)] == [Note] * 3
    assert isinstance(notes[-1], Reported) and isinstance(notes[-1].event, Note)
    assert (notes[-1].event.level, notes[-1].event.rank) == ("warning", 1)
    assert isinstance(step, Reported), "its events still count"


def test_a_chatty_rank_fills_two_files_and_the_newest_lines_are_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolrun.launch.rank_log._LOG_BYTES", 1000)
    chunks = [b"line %05d\n" % number * 5 for number in range(200)]
    posted: queue.SimpleQueue[Input] = queue.SimpleQueue()
    monitor = attended(1, ScriptedWorker([ready(1)], log=chunks), tmp_path, posted)
    monitor.begin()
    until(lambda: monitor.tail[-1:] == ["line 00199"])
    monitor.kill()
    assert monitor.join(10.0)
    now, older = sorted((tmp_path / "logs").glob("*.log*"))
    assert (now.name, older.name) == ("rank1-local.log", "rank1-local.log.1")
    assert now.stat().st_size <= 1000 and older.stat().st_size <= 1000
    cut, first, *_, last = now.read_text().splitlines()
    assert cut.startswith("(continued from rank1-local.log.1;") and last == "line 00199"
    assert int(first[5:]) == int(older.read_text().splitlines()[-1][5:]) + 1, "no line between"


def test_a_rank_that_asks_for_rows_and_reads_none_gets_a_few(tmp_path: Path) -> None:
    class Reader:
        row, row_bytes = 0, 1 << 20

        def read(self) -> bytes:
            self.row += 1
            return bytes(self.row_bytes)

    reader = Reader()
    asked = b'{"first":0,"stop":1000000000000,"next_first":null}'
    greedy = b'{"type":"task","topic":"stream","data":%s}\n' % asked

    def lines() -> Iterator[bytes]:
        yield ready(1)
        yield greedy
        until(lambda: reader.row > 0)
        before = -1
        while before != reader.row:  # until it reads no further
            before = reader.row
            time.sleep(0.1)
        yield b"end\n"

    run(tmp_path, {1: ScriptedWorker(lines(), reads=False)}, rows=reader)
    most = (streams._MOST_BYTES + streams._MOST_UNSENT_BYTES) // reader.row_bytes
    assert 0 < reader.row <= most + 1
