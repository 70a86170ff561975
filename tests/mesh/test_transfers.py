"""Which slice is next, and what is kept: decided without a socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.errors import ProtocolError
from smolrun.mesh import matching
from smolrun.mesh.matching import UnexpectedTensors
from smolrun.mesh.peer import PendingSend, SliceQueue
from smolrun.wire.frame import FrameKind, Header, Tag
from smolrun.wire.tensor import Payload


def transfer(stream: int, operation: int, size: int) -> PendingSend:
    payload = Payload(memoryview(bytearray(size)), 7, (size,))
    return PendingSend(Tag(stream, operation, 0), payload, lambda: None)


def test_streams_take_turns_and_a_streams_tensors_go_in_order() -> None:
    transfers = SliceQueue(slice_bytes=10)
    for stream, operation, size in ((1, 0, 25), (1, 1, 10), (2, 0, 20)):
        transfers.add(transfer(stream, operation, size))
    order = []
    while piece := transfers.next_slice():
        order.append((piece.send.tag.stream, piece.send.tag.operation, piece.start))
    assert order == [(1, 0, 0), (2, 0, 0), (1, 0, 10), (2, 0, 10), (1, 0, 20), (1, 1, 0)]
    assert not transfers


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=12))
def test_every_byte_leaves_once_and_in_order(sizes: list[tuple[int, int]]) -> None:
    transfers = SliceQueue(slice_bytes=7)
    for operation, (stream, size) in enumerate(sizes):
        transfers.add(transfer(stream, operation, size))
    sent: dict[int, int] = {}
    while piece := transfers.next_slice():
        operation, size = piece.send.tag.operation, len(piece.send.payload.data)
        assert piece.start == sent.get(operation, 0)
        assert 0 < piece.stop - piece.start <= 7
        assert piece.is_last == (piece.stop == size)
        sent[operation] = piece.stop
    assert sent == {operation: size for operation, (_, size) in enumerate(sizes)}


def test_a_mailbox_keeps_each_tag_once_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MAX_UNEXPECTED_BYTES", 100)
    box = UnexpectedTensors()
    header = Header(FrameKind.TENSOR, Tag(1, 0, 0), 7, (60,), 60, 0, 60)
    box.put(header, box.allocate(header))
    with pytest.raises(ProtocolError, match="two tensors"):
        box.allocate(header)
    other = header._replace(tag=Tag(1, 1, 0))
    with pytest.raises(ProtocolError, match="60 bytes in 1 tensors have no receive"):
        box.allocate(other)
    assert header.tag in box
    assert len(box.take(header.tag)[1]) == 60
    assert len(box.allocate(other)) == 60, "taking makes room"
