"""Frames survive any cutting into pieces, and nothing but ProtocolError survives any damage."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.errors import ProtocolError
from smolrun.wire.frame import (
    EAGER_BYTES,
    HEADER_BYTES,
    Frame,
    FrameDecoder,
    FrameKind,
    Header,
    Tag,
    encode_header,
)

TENSOR = Header(FrameKind.TENSOR, Tag(3, 70_000, 9), 1, (2, 3), 24, 0, 24, sender=2, generation=5)
SLICE = Header(FrameKind.SLICE, Tag(1, 4, 0), 1, (), 1000, 400, 200)
GRANT = Header(FrameKind.GRANT, Tag(1, 4, 0), 1, (250,), 1000)
BEAT = Header(FrameKind.HEARTBEAT, Tag(0, 17, 0))


def encode(headers: list[Header]) -> bytes:
    return b"".join(
        encode_header(header._replace(sequence=number))
        + bytes(range(header.nbytes))[: header.nbytes]
        for number, header in enumerate(headers)
    )


def decode(data: bytes, pieces: list[int] | None = None) -> list[Frame]:
    decoder = FrameDecoder(lambda header: memoryview(bytearray(header.nbytes)))
    frames, rest, turn = [], memoryview(data), 0
    while rest:
        room = decoder.buffer()
        count = min(len(room), len(rest), pieces[turn % len(pieces)] if pieces else len(rest))
        room[:count] = rest[:count]
        rest, turn = rest[count:], turn + 1
        frame = decoder.filled(count)
        if frame is not None:
            frames.append(frame)
    return frames


@given(
    st.lists(st.sampled_from([TENSOR, SLICE, GRANT, BEAT]), max_size=6),
    st.lists(st.integers(1, 60), min_size=1),
)
def test_frames_survive_any_cutting(headers: list[Header], pieces: list[int]) -> None:
    frames = decode(encode(headers), pieces)
    assert [frame.header for frame in frames] == [
        h._replace(sequence=n) for n, h in enumerate(headers)
    ]
    assert all(bytes(frame.payload) == bytes(range(frame.header.nbytes)) for frame in frames)


def test_the_payload_is_read_into_the_given_memory() -> None:
    home = bytearray(24)
    decoder = FrameDecoder(lambda header: memoryview(home))
    data = encode([TENSOR])
    for start, stop in (
        (0, HEADER_BYTES),
        (HEADER_BYTES, HEADER_BYTES + 16),
        (HEADER_BYTES + 16, len(data)),
    ):
        decoder.buffer()[: stop - start] = data[start:stop]
        decoder.filled(stop - start)
    assert bytes(home) == bytes(range(24))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (TENSOR._replace(nbytes=20), "payload of 20"),
        (TENSOR._replace(shape=(2, 4)), "does not make 24"),
        (TENSOR._replace(shape=(2**40, 2**40)), "does not make 24"),
        (TENSOR._replace(dtype=9), "unknown"),
        (TENSOR._replace(shape=(1,) * 9), "9 dimensions"),
        (SLICE._replace(offset=900), r"900\.\.1100 in a tensor of 1000"),
        (SLICE._replace(nbytes=0), "payload of 0"),
        (SLICE._replace(size=2**40, nbytes=2**30), "at most"),
        (SLICE._replace(shape=(250,)), "carries no shape"),
        (BEAT._replace(size=8, nbytes=8), "payload of 8"),
        (GRANT._replace(nbytes=4), "payload of 4"),
    ],
)
def test_contradictions_are_refused_before_any_memory_is_given(header: Header, words: str) -> None:
    def give_nothing(_: Header) -> memoryview:
        raise AssertionError("memory was asked for")

    decoder = FrameDecoder(give_nothing)
    data = encode_header(header)
    with pytest.raises(ProtocolError, match=words):
        while data:
            count = min(len(decoder.buffer()), len(data))
            decoder.buffer()[:count] = data[:count]
            data = data[count:]
            decoder.filled(count)


def test_a_replayed_frame_is_refused() -> None:
    with pytest.raises(ProtocolError, match="frame 0 where frame 1 was due"):
        decode(encode_header(BEAT) + encode_header(BEAT))


def test_other_protocols_are_refused() -> None:
    for stranger in (
        b"GET / HTTP/1.1\r\nHost: mini1.local\r\nAccept: */*\r\n\r\n",
        b"\x16\x03\x01" + bytes(60),
        b"SSH-2.0-" + b"x" * 60,
    ):
        with pytest.raises(ProtocolError, match="not a smolrun frame"):
            decode(stranger)


def mutate(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        where = rng.randrange(len(damaged))
        match rng.randrange(4):
            case 0:
                damaged[where] ^= 1 << rng.randrange(8)
            case 1:
                damaged[where] = rng.randrange(256)
            case 2:
                del damaged[where : where + rng.randint(1, 8)]
            case _:
                field = rng.choice(
                    [struct.pack("<Q", rng.getrandbits(64)), struct.pack("<I", 2**32 - 1), bytes(8)]
                )
                damaged[where : where + len(field)] = field
        if not damaged:
            break
    return bytes(damaged)


def feed_mutated(count: int, seed: int) -> tuple[int, int]:
    """Feeds damaged frames; returns how many were refused and the peak of memory in bytes."""
    rng = random.Random(seed)
    good = [encode([TENSOR, BEAT, SLICE]), encode([GRANT, TENSOR]), encode([SLICE, SLICE])]
    refused = 0
    tracemalloc.start()
    for _ in range(count):
        try:
            decode(mutate(rng, rng.choice(good)))
        except ProtocolError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return refused, peak


def test_20000_mutated_frames_raise_nothing_but_protocol_errors() -> None:
    refused, peak = feed_mutated(20_000, seed=1)
    assert refused > 10_000, "the mutations must really damage something"
    assert peak < 4 * 1024 * 1024, f"{peak} bytes were held at once"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_million_mutated_frames() -> None:
    refused, peak = feed_mutated(1_000_000, seed=2)
    assert refused > 500_000
    assert peak < 4 * 1024 * 1024


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_at_all(data: bytes) -> None:
    try:
        decode(data)
    except ProtocolError:
        pass  # the only way to fail; anything else fails the test


def test_limits_fit_each_other() -> None:
    assert EAGER_BYTES % 8 == 0
