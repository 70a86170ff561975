"""The order of slices, without a socket."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from smolrun.mesh.peer import PendingSend, SliceQueue
from smolrun.wire.frame import Tag
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
