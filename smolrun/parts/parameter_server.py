"""Transport between a parameter server (rank 0) and its workers: ordered messages of several
tensors each.

    worker                                       server
      pushes    [header, gradients ...]   ---->
                                         <----   weights   [header, parameters ...]
      messages  [a few integers]         <--->   messages

The n-th message that one side sends on a channel is the n-th that the other side receives. The
channels are independent streams, so a small message never waits behind a large one. Knows nothing
of what is sent; syncps and edp share it.

Source: Li et al., "Scaling Distributed Machine Learning with the Parameter Server", 2014 (push and
pull)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smolrun.mesh.mesh import Mesh, PostedReceive, Work
from smolrun.mesh.streams import Stream
from smolrun.parts.quantization import Quantization
from smolrun.wire.frame import Tag
from smolrun.wire.tensor import Payload, payload_of

SERVER = 0  # rank of the server

_Post = Callable[[int, Tag, Payload, Callable[[], None]], None]


class TensorChannel:
    """Messages to and from one peer on one stream; one thread sends, one thread receives.

    `link` binds the channel to one connection of an elastic mesh: its works fail with PeerLost once
    the peer has reconnected, so nothing reaches a process that it was not meant for."""

    def __init__(self, mesh: Mesh, peer: int, stream: int, link: int | None = None) -> None:
        self._mesh = mesh
        self._peer = peer
        self._stream = stream
        self._link = link
        self._num_sent = 0
        self._num_received = 0

    def send(self, tensors: Sequence[Tensor]) -> Work:
        """Starts to send the next message, contiguous CPU tensors that must not change until the
        work is done."""
        label = f"send to rank {self._peer}"
        return self._submit(self._mesh.post_send, self.begin_send(), tensors, label)

    def begin_send(self) -> int:
        """Number of the next message, whose parts are sent one by one with `send_part`."""
        self._num_sent += 1
        return self._num_sent - 1

    def send_part(self, message: int, index: int, tensor: Tensor) -> Work:
        """Starts to send part `index` of a message; parts may leave in any order."""
        tag = Tag(self._stream, message, index)
        return self._mesh.send(self._peer, tag, tensor, link=self._link)

    def receive(self, tensors: Sequence[Tensor], label: str = "") -> Work:
        """Starts to receive the next message into tensors of the dtypes and shapes that are sent;
        the work is done when all parts are here."""
        number = self._num_received
        self._num_received += 1
        label = label or f"receive from rank {self._peer}"

        def post(peer: int, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
            self._mesh.post_recv(peer, tag, PostedReceive(payload, on_done))

        return self._submit(post, number, tensors, label)

    def _submit(self, post: _Post, message: int, tensors: Sequence[Tensor], label: str) -> Work:
        payloads = [payload_of(tensor) for tensor in tensors]
        left = len(payloads)  # counted on the I/O thread alone

        def start(work: Work) -> None:
            def part_is_done() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    self._mesh.finish(work)

            self._mesh.check_link(self._peer, self._link)
            for index, payload in enumerate(payloads):
                post(self._peer, Tag(self._stream, message, index), payload, part_is_done)

        return self._mesh.submit(label, start, self._peer)


class Channels:
    """The three channels between a worker and the server; both ends have them."""

    def __init__(self, mesh: Mesh, peer: int, link: int | None = None) -> None:
        self.messages = TensorChannel(mesh, peer, Stream.SERVER_MESSAGES, link)
        self.pushes = TensorChannel(mesh, peer, Stream.SERVER_PUSHES, link)
        self.weights = TensorChannel(mesh, peer, Stream.SERVER_WEIGHTS, link)


def decode_gradient(
    wire: Tensor, into: Tensor, quantization: Quantization, *, adds: bool = False
) -> None:
    """Decodes a pushed gradient (uint8, CPU) into a flat tensor of any dtype and device, or adds it
    there."""
    quantizer, dtype = quantization.quantizer(), quantization.working_dtype(into.dtype)
    if into.device.type == "cpu" and into.dtype == dtype:
        quantizer.decode(wire, into, adds=adds)
        return
    decoded = torch.empty(into.shape, dtype=dtype)
    quantizer.decode(wire, decoded)
    if adds:
        into.add_(decoded.to(into.device))
    else:
        into.copy_(decoded)
