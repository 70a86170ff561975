from __future__ import annotations

import contextlib
import socket
import struct
import threading

import msgspec
import pytest

from smolrun.errors import ProtocolError
from smolrun.launch.nearby.frames import (
    MAX_PAYLOAD,
    WINDOW,
    FrameSplitter,
    Kind,
    encode,
    frame,
    read_credit,
)
from smolrun.launch.nearby.transport import RequestChannel, Transport
from tests.launch.nearby.linked import linked
from tests.waiting import until


def test_frames_come_out_as_they_went_in_however_the_bytes_fall():
    sent = [(Kind.OPEN, 7, b"{}"), (Kind.ALIVE, 0, b""), (Kind.OUT, 2**32 - 1, b"x" * MAX_PAYLOAD)]
    data = b"".join(frame(*one) for one in sent)
    for size in (1, 9, 1000, len(data)):
        splitter = FrameSplitter()
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [one for piece in pieces for one in splitter.feed(piece)] == sent


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!BII", Kind.OUT, 1, MAX_PAYLOAD + 1),
        struct.pack("!BII", 0, 1, 0),
        struct.pack("!BII", 99, 1, 0),
    ],
)
def test_a_frame_that_cannot_be_is_refused_before_its_payload_came(data: bytes):
    with pytest.raises(ProtocolError):
        list(FrameSplitter().feed(data))


@pytest.mark.parametrize("payload", [b"", b"\x00" * 5, struct.pack("!BI", Kind.OPEN, 5)])
def test_a_credit_that_cannot_be_is_refused(payload: bytes):
    with pytest.raises(ProtocolError):
        read_credit(payload)


def echo_back(channel: RequestChannel, request: dict) -> None:
    while data := channel.read(Kind.IN):
        channel.write(Kind.OUT, data)
    channel.end(Kind.OUT)
    channel.exit({"code": request["number"]})


@pytest.mark.parametrize("tls", [False, True])
def test_many_channels_carry_more_than_their_windows_both_ways_at_once(tls: bool):
    size = 3 * WINDOW
    got: dict[int, tuple[bytes, object]] = {}

    def run(coordinator: Transport, number: int) -> None:
        channel = coordinator.open({"number": number})
        feeding = threading.Thread(target=feed, args=(channel, number))
        feeding.start()
        got[number] = channel.read_all(Kind.OUT, size), channel.wait(20.0)
        feeding.join(20.0)

    def feed(channel: RequestChannel, number: int) -> None:
        channel.write(Kind.IN, bytes([number]) * size)
        channel.end(Kind.IN)

    with linked(echo_back, tls=tls) as (coordinator, _):
        threads = [threading.Thread(target=run, args=(coordinator, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
    assert got == {n: (bytes([n]) * size, {"code": n}) for n in range(4)}


def test_a_stream_that_is_not_read_delays_no_other_channel():
    stuck = threading.Event()

    def answer(channel: RequestChannel, request: dict) -> None:
        if request["number"] == 1:
            channel.write(Kind.OUT, b"x" * WINDOW)
            stuck.set()
            with contextlib.suppress(OSError):  # at the end of the test
                channel.write(Kind.OUT, b"x")  # waits for credit
        else:
            echo_back(channel, request)

    with linked(answer) as (coordinator, _):
        unread = coordinator.open({"number": 1})
        assert stuck.wait(20.0)
        other = coordinator.open({"number": 2})
        other.end(Kind.IN)
        assert other.wait(20.0) == {"code": 2}
        assert unread.wait(0.0) is None
        assert unread.read(Kind.OUT)


def test_a_connection_that_ends_ends_all_waits_on_both_sides():
    cancelled = threading.Event()

    def answer(channel: RequestChannel, request: dict) -> None:
        channel.on_cancel(cancelled.set)

    with linked(answer) as (coordinator, agent):
        channel = coordinator.open({"do": "x"})
        until(lambda: bool(agent._channels))
        coordinator.close("the run has ended")
        assert agent.wait_end(20.0)
        assert (agent.lost, agent.said_goodbye) == ("the run has ended", True)
        assert cancelled.wait(20.0)
        assert channel.wait(20.0) is None
        assert channel.read(Kind.OUT) == b""
        with pytest.raises(OSError, match="ended"):
            channel.write(Kind.IN, b"x")
        with pytest.raises(OSError, match="closed"):
            coordinator.open({"do": "x"})


def test_a_cancel_reaches_a_request_that_has_not_said_yet_what_to_do_then():
    may_look, cancelled = threading.Event(), threading.Event()

    def answer(channel: RequestChannel, request: dict) -> None:
        assert may_look.wait(20.0)
        channel.on_cancel(cancelled.set)

    with linked(answer) as (coordinator, agent):
        channel = coordinator.open({"do": "x"})
        channel.cancel()
        until(lambda: any(one.is_cancelled for one in agent._channels.values()))
        may_look.set()
        assert cancelled.wait(20.0)


def test_a_silent_side_is_noticed_and_then_lost():
    one, other = socket.socketpair()
    transport = Transport(one, "pi5", silence_limit_s=4.0)
    transport.start()
    with other:  # open, and nobody behind it
        until(lambda: transport.is_silent)
        assert transport.is_open
        assert transport.wait_end(20.0)
    assert transport.lost is not None
    assert "no answer for 4 s" in transport.lost
    assert transport.is_silent


def test_sides_that_have_nothing_to_say_stay_connected():
    with linked(silence_limit_s=2.5) as (coordinator, agent):
        assert not coordinator.wait_end(4.0)
        assert agent.is_open
        assert not agent.is_silent


HOSTILE = {
    "a stream beyond its credit": [
        frame(Kind.OUT, 1, b"x" * MAX_PAYLOAD) for _ in range(WINDOW // MAX_PAYLOAD + 1)
    ],
    "a request of the agent": [frame(Kind.OPEN, 5, encode({"do": "worker"}))],
    "bytes after the end of a stream": [
        frame(Kind.END, 1, bytes([Kind.OUT])),
        frame(Kind.OUT, 1, b"x"),
    ],
    "a result that is no object": [frame(Kind.EXIT, 1, b"[]")],
    "an end of no stream": [frame(Kind.END, 1)],
    "a second hello": [frame(Kind.HELLO, 0, b"{}"), frame(Kind.HELLO, 0, b"{}")],
    "no frame at all": [b"GET / HTTP/1.1\r\n\r\n"],
}


@pytest.mark.parametrize("frames", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_breaks_the_protocol_ends_the_connection(frames: list[bytes]):
    one, other = socket.socketpair()
    transport = Transport(one, "pi5")
    transport.start()
    with other:
        transport.open({"do": "x"})
        for data in frames:
            other.sendall(data)
        assert transport.wait_end(20.0)
    assert transport.lost is not None
    assert transport.lost.startswith(("it sent", "it said", "it named"))


class Name(msgspec.Struct):
    name: str


def test_a_hello_of_another_kind_is_an_error_and_one_that_never_comes_too():
    with linked() as (coordinator, agent):
        agent.say_hello({"name": 5})
        with pytest.raises(ProtocolError):
            coordinator.receive_hello(Name, 20.0)
        with pytest.raises(OSError, match="closed"):
            agent.receive_hello(Name, 0.01)
