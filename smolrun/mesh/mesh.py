"""What a mesh is: tensors from rank to rank, tagged, asynchronous, with a deadline on every wait.

    work = mesh.send(peer, tag, tensor)        the tensor must not change until the work is done
    work = mesh.recv(peer, tag, into)          `into` must not be touched until the work is done
    work.wait()

Sends and receives with equal tags meet in any order. Two families of methods: `send`, `recv`,
`submit` are for any thread; `post_send`, `post_recv` are for code that already runs on the I/O
thread (the hops of a collective) and call `on_done` there. Knows nothing of sockets: `tcp.py` and
`memory.py` are the two homes."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from smolrun.errors import SmolrunError, WaitTimeout
from smolrun.wire.frame import Tag
from smolrun.wire.tensor import Payload, payload_of

# combine(offset, chunk): take the bytes that belong at `offset`; used to add a slice as it arrives.
Combine = Callable[[int, memoryview], None]


class Work:
    """Something posted to the mesh. `wait` returns when it is done and raises why it failed.

    `posted_s` and `done_s` are perf_counter's, for timelines."""

    __slots__ = ("_error", "_gate", "_timeout_s", "_who", "done_s", "is_done", "label", "posted_s")

    def __init__(self, label: str, timeout_s: float, who: Callable[[], str]) -> None:
        self.label = label
        self.is_done = False
        self.posted_s = self.done_s = time.perf_counter()
        self._error: BaseException | None = None
        self._timeout_s = timeout_s
        self._who = who
        self._gate = threading.Lock()
        self._gate.acquire()

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until done; raises PeerLost, MeshClosed, ProtocolError, or WaitTimeout after the
        mesh's `timeout_s`."""
        limit = self._timeout_s if timeout_s is None else timeout_s
        if not self.is_done:
            if not self._gate.acquire(timeout=limit):
                raise WaitTimeout(
                    f"{self.label}: not done after {limit:g} s although every peer is alive; "
                    f"{self._who()}"
                )
            self._gate.release()
        if self._error is not None:
            raise self._error

    def finish(self, error: BaseException | None = None) -> None:
        """Marks the work as done; only on the I/O thread, the first call counts."""
        if not self.is_done:
            self._error = error
            self.done_s = time.perf_counter()
            self.is_done = True
            self._gate.release()


class Mesh(ABC):
    """All ranks of one run as seen from one of them."""

    def __init__(
        self, rank: int, world_size: int, *, generation: int = 0, timeout_s: float = 300.0
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.generation = generation
        self.timeout_s = timeout_s
        # The training step this rank works on; heartbeats tell it to the peers.
        self.progress = 0
        self.failure: BaseException | None = None  # why every later operation fails
        self._pending: set[Work] = set()  # touched on the I/O thread only

    # -- for any thread ----

    def send(self, peer: int, tag: Tag, tensor: torch.Tensor) -> Work:
        """Starts sending a contiguous CPU tensor; the work is done when the tensor may change
        again."""
        self._check_peer(peer)
        payload = payload_of(tensor)
        return self.submit(
            f"send to rank {peer}",
            lambda work: self.post_send(peer, tag, payload, lambda: self.finish(work)),
        )

    def recv(self, peer: int, tag: Tag, into: torch.Tensor) -> Work:
        """Starts receiving into a contiguous CPU tensor of the dtype and shape that is sent."""
        self._check_peer(peer)
        payload = payload_of(into)
        return self.submit(
            f"receive from rank {peer}",
            lambda work: self.post_recv(peer, tag, payload, lambda: self.finish(work)),
        )

    def submit(self, label: str, start: Callable[[Work], None]) -> Work:
        """Runs `start(work)` on the I/O thread; what it posts must end in `finish(work)`."""
        work = Work(label, self.timeout_s, self.describe_waiting)

        def begin() -> None:
            if self.failure is not None:
                return work.finish(self.failure)
            self._pending.add(work)
            try:
                start(work)
            except Exception as error:
                self.fail(
                    error
                )  # it may be half posted, and the peers already wait for the other half

        if self.failure is not None:
            work.finish(self.failure)
        else:
            self.post(begin)
        return work

    def _check_peer(self, peer: int) -> None:
        if peer == self.rank or not 0 <= peer < self.world_size:
            raise SmolrunError(f"rank {self.rank} of {self.world_size} has no peer {peer}")

    def describe_waiting(self) -> str:
        """Whom this rank waits for, as part of a sentence."""
        return f"rank {self.rank} waits"

    @property
    @abstractmethod
    def bytes_sent(self) -> int:
        """Bytes handed to the links so far, headers and heartbeats included."""

    @property
    @abstractmethod
    def bytes_received(self) -> int:
        """Bytes taken from the links so far."""

    @abstractmethod
    def peer_progress(self, peer: int) -> int:
        """The last `progress` heard from a peer."""

    @abstractmethod
    def post(self, function: Callable[[], None]) -> None:
        """Runs `function` on the I/O thread; callable from any thread, never blocks."""

    @abstractmethod
    def close(self) -> None:
        """Says goodbye to all peers and ends the I/O thread; pending work fails with MeshClosed.
        Safe to call twice."""

    # -- for the I/O thread ----

    @abstractmethod
    def post_send(self, peer: int, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        """Starts a send; `on_done` runs on the I/O thread when the payload may change again."""

    @abstractmethod
    def post_recv(
        self,
        peer: int,
        tag: Tag,
        payload: Payload,
        on_done: Callable[[], None],
        combine: Combine | None = None,
    ) -> None:
        """Starts a receive into `payload.data`, or, with `combine`, hands over the bytes piece by
        piece instead."""

    def finish(self, work: Work) -> None:
        """Marks submitted work as done."""
        self._pending.discard(work)
        work.finish()

    def fail(self, error: BaseException) -> None:
        """Fails all pending work and every later operation; the first reason stays."""
        if self.failure is None:
            self.failure = error
        pending, self._pending = self._pending, set()
        for work in pending:
            work.finish(self.failure)
