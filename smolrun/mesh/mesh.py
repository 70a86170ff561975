"""What a mesh is: tensors from rank to rank, tagged, asynchronous, with a deadline on every wait.

    work = mesh.send(peer, tag, tensor)        the tensor must not change until the work is done
    work = mesh.recv(peer, tag, into)          `into` must not be touched until the work is done
    work.wait()

Sends and receives with equal tags match in any order. Two families of methods: `send`, `recv`,
`submit` are for any thread; `post_send`, `post_recv` are for code that already runs on the I/O
thread (the hops of a collective) and call `on_done` there. Knows nothing of sockets: `tcp.py` and
`memory.py` implement it. Groups of ranks: `new_group` of `collectives/api.py`."""

from __future__ import annotations

import functools
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from smolrun.errors import PeerLost, SmolrunError, WaitTimeout
from smolrun.mesh.streams import Fingerprints, Groups
from smolrun.wire.frame import Tag
from smolrun.wire.tensor import Payload, payload_of

# callback(rank, is_present, reason): a peer has joined, or is gone and why.
MembershipCallback = Callable[[int, bool, str], None]
# combine(offset, chunk): combines the bytes at `offset`; adds a slice as it arrives.
Combine = Callable[[int, memoryview], None]


@dataclass(slots=True)
class PostedReceive:
    """A receive: the memory that bytes go to, or, if there is one, the function that takes them
    piece by piece instead. `on_done` runs on the I/O thread."""

    payload: Payload
    on_done: Callable[[], None]
    combine: Combine | None = None
    received: int = 0  # bytes so far


class Work:
    """An operation posted to the mesh, as torch.distributed's Work. `wait` returns when it is done
    and raises why it failed.

    `error` is that reason, None before the end and after success. `peer` is the one rank that it
    needs; None if it may be several. `posted_s` and `done_s` are of perf_counter."""

    def __init__(self, label: str, mesh: Mesh, peer: int | None = None) -> None:
        self.label = label
        self.peer = peer
        self.is_done = False
        self.posted_s = self.done_s = time.perf_counter()
        self.error: BaseException | None = None
        self._mesh = mesh
        self._timeout_s = mesh.timeout_s
        self._done_callbacks: list[Callable[[Work], None]] = []
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
                    f"{self._mesh.describe_waiting()}",
                    self._mesh.waits_for() if self.peer is None else self.peer,
                )
            self._gate.release()
        if self.error is not None:
            raise self.error

    def finish(self, error: BaseException | None = None) -> None:
        """Marks the work as done; only on the I/O thread, the first call counts."""
        if not self.is_done:
            self.error = error
            self.done_s = time.perf_counter()
            self.is_done = True
            self._gate.release()
            self._run_callbacks()

    def add_done_callback(self, callback: Callable[[Work], None]) -> None:
        """Runs `callback(work)` on the I/O thread once the work is done or has failed (see
        `error`); soon if it is over already. What it raises breaks the mesh."""
        self._done_callbacks.append(callback)
        if self.is_done:
            self._run_callbacks()

    def _run_callbacks(self) -> None:
        # Posted, not called: the caller of `finish` may be in the middle of a peer's bytes.
        while self._done_callbacks:
            try:
                callback = self._done_callbacks.pop(0)
            except IndexError:
                return  # the other thread was faster
            self._mesh.post(functools.partial(callback, self))


class Mesh(ABC):
    """All ranks of one run as seen from one of them."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        generation: int = 0,
        timeout_s: float = 300.0,
        members: Sequence[int] | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        # The ranks of this generation, in order: of `world_size` ranks, those that are there.
        self.members = sorted(range(world_size) if members is None else members)
        self.generation = generation
        self.timeout_s = timeout_s
        # The training step this rank works on; heartbeats carry it to the peers.
        self.progress = 0
        self.failure: BaseException | None = None  # why every later operation fails
        self._pending: set[Work] = set()  # touched on the I/O thread only
        self._membership_callbacks: list[MembershipCallback] = []  # as above
        self.groups = Groups()
        self.fingerprints = Fingerprints()  # checked on the I/O thread only
        self._links: Counter[int] = Counter()  # by peer, how often it has joined; as above

    # -- for any thread ----

    def send(self, peer: int, tag: Tag, tensor: torch.Tensor, *, link: int | None = None) -> Work:
        """Starts sending a contiguous CPU tensor; the work is done when the tensor may change
        again. It fails if `link` is an earlier link with the peer (`link_with`)."""
        self._check_peer(peer)
        payload = payload_of(tensor)

        def start(work: Work) -> None:
            self.check_link(peer, link)
            self.post_send(peer, tag, payload, lambda: self.finish(work))

        return self.submit(f"send to rank {peer}", start, peer)

    def recv(self, peer: int, tag: Tag, into: torch.Tensor, *, link: int | None = None) -> Work:
        """Starts receiving into a contiguous CPU tensor of the dtype and shape that is sent.
        `link` as for `send`."""
        self._check_peer(peer)
        payload = payload_of(into)

        def start(work: Work) -> None:
            self.check_link(peer, link)
            self.post_recv(peer, tag, PostedReceive(payload, lambda: self.finish(work)))

        return self.submit(f"receive from rank {peer}", start, peer)

    def submit(self, label: str, start: Callable[[Work], None], peer: int | None = None) -> Work:
        """Runs `start(work)` on the I/O thread; what it posts must end in `finish(work)`.

        `peer` is the rank that it posts to, if it is one alone."""
        work = Work(label, self, peer)

        def begin() -> None:
            if self.failure is not None:
                return work.finish(self.failure)
            self._pending.add(work)
            try:
                start(work)
            except Exception as error:
                self._could_not_start(work, error)

        if self.failure is not None:
            work.finish(self.failure)
        else:
            self.post(begin)
        return work

    def _could_not_start(self, work: Work, error: Exception) -> None:
        """The work may be half posted, and peers wait for the other half: the mesh fails."""
        self.fail(error)

    def _check_peer(self, peer: int) -> None:
        if peer == self.rank or peer not in self.members:
            raise SmolrunError(
                f"rank {self.rank} has no peer {peer} in generation {self.generation}, of ranks "
                f"{self.members}"
            )

    @property
    def present(self) -> frozenset[int]:
        """The peers that this rank has a link with; changes at any time if the mesh is elastic."""
        return frozenset(self.members) - {self.rank}

    def on_membership_change(self, callback: MembershipCallback) -> None:
        """Calls `callback(rank, is_present, reason)` on the I/O thread for every peer that is
        present, and then whenever one joins or is lost, which happens in an elastic mesh only.

        The reason of a peer that sent GOODBYE is "left"."""

        def begin() -> None:
            self._membership_callbacks.append(callback)
            for rank in sorted(self.present):
                callback(rank, True, "joined")

        self.post(begin)

    def waits_for(self) -> int | None:
        """The peer that pending work waits for; None if there is none, or it is not known."""
        return None

    def describe_waiting(self) -> str:
        """The peers that this rank waits for, for an error message."""
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
        """The last `progress` received from a peer."""

    @abstractmethod
    def post(self, function: Callable[[], None]) -> None:
        """Runs `function` on the I/O thread; callable from any thread, never blocks."""

    @abstractmethod
    def close(self) -> None:
        """Sends GOODBYE to all peers and ends the I/O thread; pending work fails with MeshClosed.
        Idempotent."""

    # -- for the I/O thread ----

    def begin_operation(self, tag: Tag, fingerprint: int) -> None:
        """Called before anything of an operation is posted; CollectiveMismatch if a peer is known
        to run another one under this tag."""
        self.fingerprints.check(self.rank, tag, fingerprint)

    def link_with(self, peer: int) -> int:
        """The number of the current link with a peer: one that rejoins has a new link, and nothing
        of the old one is delivered."""
        return self._links[peer]

    def check_link(self, peer: int, link: int | None) -> None:
        if link is not None and link != self._links[peer]:
            raise PeerLost(peer, self.generation, "it has rejoined since")

    @abstractmethod
    def post_send(self, peer: int, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        """Starts a send; `on_done` runs on the I/O thread when the payload may change again."""

    @abstractmethod
    def post_recv(self, peer: int, tag: Tag, receive: PostedReceive) -> None:
        """Starts a receive."""

    def finish(self, work: Work) -> None:
        """Marks submitted work as done."""
        self._pending.discard(work)
        work.finish()

    def membership_changed(self, rank: int, is_present: bool, reason: str) -> None:
        """Runs the membership callbacks: a peer has joined or is gone."""
        self._links[rank] += is_present
        for callback in list(self._membership_callbacks):
            callback(rank, is_present, reason)

    def fail_work_with(self, error: PeerLost) -> None:
        """Fails what is pending with one lost peer, and what may need all peers."""
        failed = {work for work in self._pending if work.peer in (None, error.rank)}
        self._pending -= failed
        for work in failed:
            work.finish(error)

    def fail(self, error: BaseException) -> None:
        """Fails all pending work and every later operation; the first reason stays."""
        if self.failure is None:
            self.failure = error
        pending, self._pending = self._pending, set()
        for work in pending:
            work.finish(self.failure)
