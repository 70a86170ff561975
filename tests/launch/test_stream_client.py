"""Rows at the worker: taken in the order of the requests, with a deadline, and nothing unasked."""

from __future__ import annotations

import threading

import pytest

from smolrun.errors import DataError, ProtocolError
from smolrun.launch.control import Message, StreamRequest, StreamRows
from smolrun.launch.stream_client import StreamClient


def rows(first: int, count: int) -> StreamRows:
    return StreamRows(first=first, count=count, data=bytes(range(first, first + count)))


def test_requests_go_out_and_rows_are_taken_in_their_order() -> None:
    sent: list[Message] = []
    inbox = StreamClient(sent.append)
    inbox.request(0, 4, 10)
    inbox.request(10, 12, None)
    assert sent == [
        StreamRequest(first=0, stop=4, next_first=10),
        StreamRequest(first=10, stop=12, next_first=None),
    ]
    for message in (rows(0, 3), rows(3, 1), rows(10, 2)):
        inbox.put(message)
    assert inbox.take(0, 4, 1.0) == bytes([0, 1, 2, 3])
    assert inbox.take(10, 12, 1.0) == bytes([10, 11])


def test_a_share_of_nothing_is_told_and_not_waited_for() -> None:
    sent: list[Message] = []
    inbox = StreamClient(sent.append)
    inbox.request(5, 5, 9)
    assert sent == [StreamRequest(first=5, stop=5, next_first=9)]
    assert inbox.take(5, 5, 0.0) == b""


def test_a_wait_ends_when_the_rows_come() -> None:
    inbox = StreamClient(lambda message: None)
    inbox.request(0, 2, None)
    taken: list[bytes] = []
    thread = threading.Thread(target=lambda: taken.append(inbox.take(0, 2, 10.0)))
    thread.start()
    inbox.put(rows(0, 1))
    inbox.put(rows(1, 1))
    thread.join(20)
    assert taken == [b"\0\1"]


def test_a_wait_has_a_deadline_and_names_the_reader() -> None:
    inbox = StreamClient(lambda message: None)
    inbox.request(8, 12, None)
    inbox.put(rows(8, 3))
    with pytest.raises(
        DataError, match=r"waited 0\.05 s for rows 8 to 11 .* has sent 3: .*timeout"
    ):
        inbox.take(8, 12, 0.05)


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
    inbox = StreamClient(lambda message: None)
    with pytest.raises(ProtocolError, match="did not ask for"):
        inbox.put(message)
    inbox.request(0, 4, None)
    with pytest.raises(ProtocolError, match="did not ask for"):
        inbox.put(message)
