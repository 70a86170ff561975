"""Unexpected tensors: one per tag, and bounded."""

from __future__ import annotations

import pytest

from smolrun.errors import ProtocolError
from smolrun.mesh import matching
from smolrun.mesh.matching import UnexpectedTensors
from smolrun.wire.frame import FrameKind, Header, Tag


def test_unexpected_tensors_are_unique_per_tag_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
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
