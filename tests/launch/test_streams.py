"""Rows of a stream go to those who asked, once each, and are not kept longer than needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.errors import DataError, ProtocolError
from smolrun.launch import streams
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.launch.driver import Driver
from smolrun.launch.streams import (
    StreamBuffer,
    StreamClient,
    StreamRequest,
    StreamRows,
    StreamServer,
)
from tests.launch.deadline import until


def row(number: int) -> bytes:
    return number.to_bytes(4, "little")


def numbers(message: StreamRows) -> list[int]:
    size = len(message.data) // message.count
    parts = [message.data[at : at + size] for at in range(0, len(message.data), size)]
    assert len(parts) == message.count
    return [int.from_bytes(part, "little") for part in parts]


def want(first: int, stop: int, next_first: int | None) -> StreamRequest:
    return StreamRequest(first=first, stop=stop, next_first=next_first)


def read(buffer: StreamBuffer, count: int = 1000) -> int:
    """Read as the server would, at most `count` rows; how many it wanted."""
    done = 0
    while buffer.wants_row and done < count:
        buffer.add(row(read_so_far[0]))
        read_so_far[0] += 1
        done += 1
    return done


read_so_far = [0]


@pytest.fixture
def buffer() -> StreamBuffer:
    read_so_far[0] = 0
    return StreamBuffer([0, 1], first=0, row_bytes=4)


def told(buffer: StreamBuffer) -> dict[int, list[int]]:
    given: dict[int, list[int]] = {}
    for rank, message in buffer.due():
        assert numbers(message)[0] == message.first
        given.setdefault(rank, []).extend(numbers(message))
    return given


def test_each_rank_gets_its_rows_and_only_when_all_of_them_are_there(buffer: StreamBuffer) -> None:
    assert not buffer.wants_row, "nothing is read before somebody asks"
    buffer.want(1, want(3, 5, 9))
    assert read(buffer, 4) == 4
    assert told(buffer) == {}
    buffer.want(0, want(0, 3, 6))
    assert told(buffer) == {0: [0, 1, 2]}
    assert len(buffer._rows) == 1, "row 3 waits for row 4"
    assert read(buffer) == 1
    assert told(buffer) == {1: [3, 4]}
    assert len(buffer._rows) == 0
    assert not buffer.wants_row, "rows are read when they are wanted, not before"


def test_rows_that_two_ranks_need_are_read_once_and_kept_for_the_second(
    buffer: StreamBuffer,
) -> None:
    buffer.want(0, want(0, 2, 2))
    assert read(buffer) == 2
    assert told(buffer) == {0: [0, 1]}
    assert len(buffer._rows) == 2
    buffer.want(1, want(0, 2, 2))
    assert not buffer.wants_row
    assert told(buffer) == {1: [0, 1]}
    assert len(buffer._rows) == 0


def test_rows_that_nobody_needs_are_read_over(buffer: StreamBuffer) -> None:
    buffer.want(0, want(4, 6, None))
    buffer.want(1, want(8, 9, None))
    assert read(buffer) == 9
    assert told(buffer) == {0: [4, 5], 1: [8]}
    assert len(buffer._rows) == 0


def test_a_slow_rank_stops_the_reading_and_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MOST_BYTES", 40)
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 8)
    read_so_far[0] = 0
    buffer = StreamBuffer([0, 1], first=0, row_bytes=4)
    for step in range(50):  # rank 0 is far ahead; rank 1 has not begun
        buffer.want(0, want(4 * step, 4 * step + 2, 4 * step + 4))
    highest = 0
    while read(buffer, 1):
        buffer.due()
        highest = max(highest, len(buffer._rows))
    assert highest == 10
    assert read_so_far[0] == 10
    for step in range(50):  # and now it comes
        buffer.want(1, want(4 * step + 2, 4 * step + 4, 4 * step + 6))
        while read(buffer, 1):
            buffer.due()
            highest = max(highest, len(buffer._rows))
        buffer.due()
    assert highest <= 10
    assert read_so_far[0] == 200


def test_long_requests_travel_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 10)
    read_so_far[0] = 0
    buffer = StreamBuffer([0], first=0, row_bytes=4)
    buffer.want(0, want(0, 5, None))
    read(buffer, 3)
    assert [(m.first, numbers(m)) for _, m in buffer.due()] == [(0, [0, 1])]
    read(buffer)
    assert [(m.first, numbers(m)) for _, m in buffer.due()] == [(2, [2, 3]), (4, [4])]


def test_a_row_longer_than_a_chunk_travels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 2)
    monkeypatch.setattr(streams, "_MOST_BYTES", 2)
    read_so_far[0] = 0
    buffer = StreamBuffer([0], first=0, row_bytes=4)
    buffer.want(0, want(0, 2, None))
    assert read(buffer) == 1
    assert [m.count for _, m in buffer.due()] == [1]
    assert read(buffer) == 1


def test_a_rank_that_does_not_read_gets_no_more_until_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "_MOST_UNSENT_BYTES", 16)
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 8)
    read_so_far[0] = 0
    buffer = StreamBuffer([0, 1], first=0, row_bytes=4)
    buffer.want(0, want(0, 100, None))
    buffer.want(1, want(100, 102, None))
    read(buffer)
    sent = buffer.due()
    assert [numbers(m) for rank, m in sent if rank == 0] == [[0, 1], [2, 3]]
    assert [numbers(m) for rank, m in sent if rank == 1] == [[100, 101]], "others do not wait"
    assert buffer.due() == []
    buffer.sent(0, sent[0][1])
    assert [numbers(m) for _, m in buffer.due()] == [[4, 5]]


@pytest.mark.parametrize(
    ("rank", "wanted", "reason"),
    [
        (0, want(3, 5, 9), "needs none before 4"),
        (0, want(5, 4, 9), "needs none before 4"),
        (0, want(5, 7, 6), "needs none before 4"),
        (0, want(-1, 0, 0), "needs none before 4"),
        (1, want(9, 10, 11), "of which it is to get none"),
        (2, want(0, 1, 1), "of which it is to get none"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    buffer: StreamBuffer, rank: int, wanted: StreamRequest, reason: str
) -> None:
    buffer.want(0, want(0, 2, 4))
    buffer.want(1, want(2, 4, None))
    with pytest.raises(ProtocolError, match=reason):
        buffer.want(rank, wanted)


def test_endless_requests_are_refused(buffer: StreamBuffer) -> None:
    with pytest.raises(ProtocolError, match="1024 requests open"):
        for number in range(2000):
            buffer.want(0, want(number, number + 1, number + 1))


class Reader:
    """Rows that hold their number; waits at `hold_at`, and fails at `fail_at`."""

    row_bytes = 4

    def __init__(self, hold_at: int | None = None, error: Exception | None = None) -> None:
        self.row = 0
        self.hold_at = hold_at
        self.error = error
        self.go_on = threading.Event()

    def read(self) -> bytes:
        if self.row == self.hold_at:
            assert self.go_on.wait(20)
            if self.error:
                raise self.error
        self.row += 1
        return row(self.row - 1)


class FakeDriver:
    """A server, and what it sends and reports."""

    def __init__(self, reader: Any, ranks: int = 2) -> None:
        self.ranks = list(range(ranks))
        self.sent: queue.SimpleQueue[tuple[int, TaskMessage]] = queue.SimpleQueue()
        self.failed: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.server = StreamServer(reader)
        self.server.on_start(cast(Driver, self))

    def send(self, rank: int, message: TaskMessage, on_sent: Callable[[], None]) -> None:
        self.sent.put((rank, message))
        on_sent()

    def fail(self, problem: str) -> None:
        self.failed.put(problem)

    def want(self, rank: int, wanted: StreamRequest) -> None:
        self.server.on_message(rank, task_message("stream", wanted))

    def got(self) -> tuple[int, list[int]]:
        rank, message = self.sent.get(timeout=20)
        return rank, numbers(decode_data(message, StreamRows))


def test_a_slow_reader_does_not_hold_up_what_was_read_before() -> None:
    reader = Reader(hold_at=4)
    driver = FakeDriver(reader)
    driver.want(0, want(0, 2, 6))
    driver.want(1, want(4, 6, 10))
    assert driver.got() == (0, [0, 1])
    until(lambda: reader.row == 4)
    driver.want(0, want(6, 7, None))  # does not wait for the reader
    reader.go_on.set()
    assert driver.got() == (1, [4, 5])
    assert driver.got() == (0, [6])
    driver.server.on_end()
    assert "smolrun-rows" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DataError("document 17 has no column text"), "document 17 has no column text"),
        (KeyError("text"), "KeyError: 'text'"),
    ],
)
def test_a_reader_that_fails_midway_is_told_once(error: Exception, sentence: str) -> None:
    reader = Reader(hold_at=3, error=error)
    reader.go_on.set()
    driver = FakeDriver(reader)
    driver.want(0, want(0, 2, 6))
    driver.want(1, want(2, 4, 6))
    assert driver.got() == (0, [0, 1])
    problem = driver.failed.get(timeout=20)
    assert problem == f"the driver cannot read the stream any more: {sentence}"
    driver.want(0, want(6, 7, 8))
    driver.server.on_end()
    assert driver.failed.empty()
    assert driver.sent.empty()


def test_a_reader_that_hangs_does_not_keep_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_LAST_JOIN_S", 0.05)
    reader = Reader(hold_at=0)
    driver = FakeDriver(reader)
    driver.want(0, want(0, 2, 6))
    driver.server.on_end()
    reader.go_on.set()
    until(lambda: "smolrun-rows" not in [thread.name for thread in threading.enumerate()])
    assert driver.sent.empty()


@pytest.mark.parametrize(
    "data",
    [
        b'{"first":-1,"stop":1,"next_first":null}',
        b'{"first":0,"stop":"1","next_first":null}',
        b'{"first":0,"stop":1}',
        b'{"first":0,"stop":1,"next_first":2,"more":3}',
        b"[]",
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_a_request_that_is_not_one_is_a_violation(data: bytes) -> None:
    driver = FakeDriver(Reader())
    with pytest.raises(ProtocolError, match="sent an invalid stream message"):
        driver.server.on_message(0, TaskMessage("stream", msgspec.Raw(data)))
    driver.server.on_end()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_the_order_every_rank_gets_its_rows_and_memory_is_bounded(
    data: st.DataObject,
) -> None:
    """Ranks with shares of their own, one step after the other, some steps apart."""
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    steps, total = data.draw(st.integers(1, 8)), sum(sizes)
    buffer = StreamBuffer(range(len(sizes)), first=0, row_bytes=4)
    buffer._most_kept, buffer._chunk = data.draw(st.integers(2, 9)), 2
    firsts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    asked, got, number = [0] * len(sizes), [[] for _ in sizes], 0
    while True:
        for rank, message in buffer.due():
            got[rank] += numbers(message)
        assert len(buffer._rows) <= buffer._most_kept
        # No rank is more than two steps ahead of another, as in a run with staleness.
        may_ask = [r for r, step in enumerate(asked) if step < min(steps, min(asked) + 2)]
        acts = [*may_ask, *([-1] if buffer.wants_row else [])]
        if not acts:
            break
        act = data.draw(st.sampled_from(acts))
        if act == -1:
            buffer.add(row(number))
            number += 1
            continue
        first = asked[act] * total + firsts[act]
        asked[act] += 1
        following = first + total if asked[act] < steps else None
        buffer.want(act, want(first, first + sizes[act], following))
    assert asked == [steps] * len(sizes)
    for rank, size in enumerate(sizes):
        assert got[rank] == [
            step * total + firsts[rank] + offset for step in range(steps) for offset in range(size)
        ]
    assert len(buffer._rows) == 0


# -- the worker's end ----


class FakeChannel:
    """Keeps what the client sends; `receive` is a message of the driver."""

    def __init__(self) -> None:
        self.sent: list[msgspec.Struct] = []

    def send_data(self, topic: str, data: msgspec.Struct) -> None:
        assert topic == "stream"
        self.sent.append(data)

    def subscribe(self, topic: str, handler: Callable[[TaskMessage], None]) -> None:
        self._handler = handler

    def receive(self, rows: StreamRows) -> None:
        self._handler(task_message("stream", rows))


def rows(first: int, count: int) -> StreamRows:
    return StreamRows(first=first, count=count, data=bytes(range(first, first + count)))


def test_requests_go_out_and_rows_are_taken_in_their_order() -> None:
    channel = FakeChannel()
    client = StreamClient(channel)
    client.request(0, 4, 10)
    client.request(10, 12, None)
    assert channel.sent == [
        StreamRequest(first=0, stop=4, next_first=10),
        StreamRequest(first=10, stop=12, next_first=None),
    ]
    for message in (rows(0, 3), rows(3, 1), rows(10, 2)):
        channel.receive(message)
    assert client.take(0, 4, 1.0) == bytes([0, 1, 2, 3])
    assert client.take(10, 12, 1.0) == bytes([10, 11])


def test_a_share_of_nothing_is_told_and_not_waited_for() -> None:
    channel = FakeChannel()
    client = StreamClient(channel)
    client.request(5, 5, 9)
    assert channel.sent == [StreamRequest(first=5, stop=5, next_first=9)]
    assert client.take(5, 5, 0.0) == b""


def test_a_wait_ends_when_the_rows_come() -> None:
    channel = FakeChannel()
    client = StreamClient(channel)
    client.request(0, 2, None)
    taken: list[bytes] = []
    thread = threading.Thread(target=lambda: taken.append(client.take(0, 2, 10.0)))
    thread.start()
    channel.receive(rows(0, 1))
    channel.receive(rows(1, 1))
    thread.join(20)
    assert taken == [b"\0\1"]


def test_a_wait_has_a_deadline_and_names_the_reader() -> None:
    channel = FakeChannel()
    client = StreamClient(channel)
    client.request(8, 12, None)
    channel.receive(rows(8, 3))
    with pytest.raises(
        DataError, match=r"waited 0\.05 s for rows 8 to 11 .* has sent 3: .*timeout"
    ):
        client.take(8, 12, 0.05)


@pytest.mark.parametrize(
    "message",
    [
        rows(1, 2),
        rows(0, 5),
        StreamRows(first=0, count=0, data=b""),
        StreamRows(first=0, count=2, data=b"abc"),
        StreamRows(first=0, count=-1, data=b"a"),
    ],
)
def test_rows_that_were_not_asked_for_are_refused(message: StreamRows) -> None:
    channel = FakeChannel()
    client = StreamClient(channel)
    with pytest.raises(ProtocolError, match="did not ask for"):
        channel.receive(message)
    client.request(0, 4, None)
    with pytest.raises(ProtocolError, match="did not ask for"):
        channel.receive(message)
