"""The language of the control protocol: what goes through, and what is refused with which words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.errors import ProtocolError
from smolrun.events import EvalDone
from smolrun.launch.control import (
    AbortMessage,
    Address,
    ErrorReport,
    EventMessage,
    LeaseMessage,
    LineSplitter,
    LogMessage,
    Message,
    ReadyMessage,
    ResultMessage,
    RosterMessage,
    RosterPeer,
    StartMessage,
    StopMessage,
    decode_from_driver,
    decode_from_worker,
    encode,
)

START = StartMessage(
    rank=1,
    world_size=2,
    host="local",
    run_id="20260101-000000-single-mlp-abcd",
    config={"seed": 1, "model": {"name": "mlp"}},
    config_hash="c0ffee",
    secret="5e" * 32,
    addresses=["10.0.0.2", "fe80::2"],
    device="cpu",
    threads=1,
)


@pytest.mark.parametrize(
    "message",
    [
        START,
        RosterMessage(
            peers=[
                RosterPeer(0, "a", [Address("127.0.0.1", 1)]),
                RosterPeer(1, "b", [Address("::1", 2)]),
            ]
        ),
        LeaseMessage(),
        StopMessage(),
        AbortMessage(),
    ],
)
def test_what_the_driver_says_arrives_unchanged(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode_from_driver(line) == message


@pytest.mark.parametrize(
    "message",
    [
        ReadyMessage(
            rank=1, addresses=[Address("::1", 4000)], pid=7, versions={"python": "3.11.7"}
        ),
        EventMessage(data=EvalDone(step=3, loss=1.5, tokens=8)),
        LogMessage(level="warning", message="two\nlines and \u2028 more"),
        ResultMessage(status="done", summary={"steps": 3}),
        ResultMessage(status="failed", error=ErrorReport("PeerLost", "lost rank 1", 1)),
    ],
)
def test_what_a_worker_says_arrives_unchanged(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode_from_worker(line) == message


def test_a_start_message_has_the_keys_of_the_design() -> None:
    line = encode(START)
    assert line.startswith(b'{"type":"start","rank":1,')
    assert b'"links":"all"' in line


def test_printing_a_start_message_shows_neither_secret_nor_config() -> None:
    assert "5e5e" not in repr(START) + str([START])
    assert "seed" not in repr(START)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello",
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b'{"type":"lease"}',  # only the driver says that
        b'{"type":"ready","rank":0,"addresses":["x"],"pid":1,"versions":{}}',
        b'{"type":"ready","rank":0,"addresses":[],"pid":1,"versions":{},"more":1}',
        b'{"type":"event","data":{"a":' + b"[" * 100_000,
        b'{"type":"result","status":"fine"}',
    ],
)
def test_a_line_that_is_no_message_is_refused_and_shown(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="no message") as caught:
        decode_from_worker(line)
    assert len(str(caught.value)) < 400


def test_a_bad_line_of_the_driver_is_not_shown_because_it_may_hold_the_secret() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_from_driver(encode(START).replace(b'"rank":1', b'"rank":"x"'))
    assert "5e5e" not in str(caught.value)


def test_numbers_that_are_not_finite_travel_as_null() -> None:
    line = encode(EventMessage(data=EvalDone(step=1, loss=math.nan, tokens=1)))
    assert b'"loss":null' in line


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b""))), st.integers(1, 30))
def test_lines_survive_any_slicing(lines: list[bytes], slice_bytes: int) -> None:
    stream = b"".join(line + b"\n" for line in lines) + b"unfinished"
    splitter = LineSplitter()
    got: list[bytes] = []
    for at in range(0, len(stream), slice_bytes):
        got += splitter.feed(stream[at : at + slice_bytes])
    assert got == lines


@pytest.mark.parametrize("slice_bytes", [1, 7, 1000])
def test_a_line_past_the_limit_is_refused_before_it_ends(slice_bytes: int) -> None:
    splitter = LineSplitter(limit=100)
    assert splitter.feed(b"x" * 100 + b"\n") == [b"x" * 100]
    for _ in range(100 // slice_bytes):
        splitter.feed(b"x" * slice_bytes)
    with pytest.raises(ProtocolError, match="more than 100 bytes"):
        splitter.feed(b"x" * slice_bytes)
