"""Small tensors that came before anybody asked for them: kept by tag, within limits."""

from __future__ import annotations

from smolrun.errors import ProtocolError
from smolrun.wire.frame import Header, Tag

# Far above what collectives leave unread; a peer that passes it sends what nobody will ever want.
MAX_BYTES = 64 * 1024 * 1024
MAX_TENSORS = 65536


class Mailbox:
    """What one peer has sent and nobody has taken yet."""

    def __init__(self) -> None:
        self._kept: dict[Tag, tuple[Header, memoryview]] = {}
        self._bytes = 0

    def __contains__(self, tag: Tag) -> bool:
        return tag in self._kept

    def room_for(self, header: Header) -> memoryview:
        """Fresh memory for a tensor; ProtocolError where the limits are reached or it is here."""
        if header.tag in self._kept:
            raise ProtocolError(f"two tensors for {header.tag}")
        if self._bytes + header.nbytes > MAX_BYTES or len(self._kept) >= MAX_TENSORS:
            waiting = f"{self._bytes} bytes in {len(self._kept)} tensors wait"
            raise ProtocolError(f"{waiting}, and nobody wants them")
        return memoryview(bytearray(header.nbytes))

    def put(self, header: Header, data: memoryview) -> None:
        """Keeps a tensor."""
        self._kept[header.tag] = (header, data)
        self._bytes += len(data)

    def take(self, tag: Tag) -> tuple[Header, memoryview]:
        """Hands a tensor over."""
        header, data = self._kept.pop(tag)
        self._bytes -= len(data)
        return header, data
