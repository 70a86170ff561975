"""The mesh inside one process: every rank is a thread of the caller, one shared I/O thread
matches sends and receives.

For tests and docs, without sockets, ports or processes. Unlike TcpMesh it has no eager sends: a
send is done when its receive was posted; and a rank that closes its mesh is not lost to the others,
unless the world is elastic. Then it is a star, as a run with a parameter server is: rank 0 has a
link with every rank, the others with rank 0 only.

    world = MemoryWorld(3, elastic=True, present={0, 1})
    world.leave(1, "it was killed")      work with rank 1 fails, nothing else
    mesh = world.join(2)                 also for a rank that rejoins
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from smolrun.errors import CollectiveMismatch, MeshClosed, PeerLost, ProtocolError
from smolrun.mesh.io import IoThread
from smolrun.mesh.mesh import Mesh, PostedReceive, Work
from smolrun.wire.frame import Tag
from smolrun.wire.tensor import Payload

_Key = tuple[int, int, Tag]  # from, to, tag


class MemoryWorld:
    """The ranks of one process: `meshes[rank]` is that rank's mesh."""

    def __init__(
        self,
        world_size: int,
        *,
        timeout_s: float = 30.0,
        elastic: bool = False,
        present: Iterable[int] | None = None,
    ) -> None:
        """`present`, if elastic: the ranks that are there from the start; default all."""
        self.io = IoThread("mesh-memory", self._failed)
        self.is_elastic = elastic
        self.present = frozenset(range(world_size) if present is None else present)
        self.meshes = [MemoryMesh(self, rank, world_size, timeout_s) for rank in range(world_size)]
        self._sends: dict[_Key, tuple[Payload, Callable[[], None]]] = {}
        self._receives: dict[_Key, PostedReceive] = {}
        self._open = set(self.present)
        self.io.start()

    def linked(self, rank: int) -> frozenset[int]:
        """The peers of a rank, in an elastic world."""
        if rank not in self.present:
            return frozenset()
        return (self.present if rank == 0 else self.present & {0}) - {rank}

    def join(self, rank: int) -> MemoryMesh:
        """A rank joins or rejoins; returns its new mesh."""
        old = self.meshes[rank]
        mesh = self.meshes[rank] = MemoryMesh(self, rank, old.world_size, old.timeout_s)
        self._open.add(rank)

        def apply() -> None:
            self.present |= {rank}
            for other in sorted(self.linked(rank)):
                self.meshes[other].membership_changed(rank, True, "joined")

        self.io.post(apply)
        return mesh

    def leave(self, rank: int, reason: str = "left") -> None:
        """A rank is gone: it closed its mesh or, with another reason, died."""

        leaving = self.meshes[rank]

        def apply() -> None:
            linked = self.linked(rank)
            self.present -= {rank}
            leaving.has_left = True
            for other in sorted(linked):
                for mesh, lost in ((self.meshes[other], rank), (leaving, other)):
                    self._forget(mesh.rank, lost)
                    mesh.fail_work_with(PeerLost(lost, mesh.generation, reason))
                self.meshes[other].membership_changed(rank, False, reason)

        self.io.post(apply)

    def _forget(self, one: int, other: int) -> None:
        for waiting in (self._sends, self._receives):
            for key in [key for key in waiting if key[:2] == (one, other)]:
                del waiting[key]

    def lose(self, rank: int, reason: str = "it was taken away") -> None:
        """Makes all other ranks lose `rank`, as if it had died; for tests."""

        def apply() -> None:
            for mesh in self.meshes:
                if mesh.rank != rank:
                    mesh.fail(PeerLost(rank, mesh.generation, reason))

        self.io.post(apply)

    def check_fingerprint(self, mesh: MemoryMesh, peer: int, tag: Tag) -> None:
        """Checks the operation at the peer, as the header of a frame does."""
        self.meshes[peer].fingerprints.check(mesh.rank, tag, mesh.fingerprints.of(tag))

    def match_send(self, key: _Key, payload: Payload, on_done: Callable[[], None]) -> None:
        """A send was posted: delivers it, or keeps it until its receive is posted."""
        receive = self._receives.pop(key, None)
        if receive is None:
            self._sends[key] = (payload, on_done)
        else:
            self._deliver(payload, on_done, receive)

    def match_recv(self, key: _Key, receive: PostedReceive) -> None:
        """A receive was posted: takes the matching send, or keeps it until that is posted."""
        send = self._sends.pop(key, None)
        if send is None:
            self._receives[key] = receive
        else:
            self._deliver(*send, receive)

    def _deliver(self, sent: Payload, on_sent: Callable[[], None], receive: PostedReceive) -> None:
        wanted = receive.payload
        if (sent.dtype, sent.shape) != (wanted.dtype, wanted.shape):
            shapes = f"{list(sent.shape)} was sent where {list(wanted.shape)} is expected"
            self._failed(ProtocolError(f"{shapes}: the two ranks run different operations"))
            return
        if receive.combine is not None:
            receive.combine(0, sent.data)
        else:
            wanted.data[:] = sent.data
        # Posted, not called: a long chain of hops must not become a deep stack.
        self.io.post(on_sent)
        self.io.post(receive.on_done)

    def closed(self, rank: int) -> None:
        """A rank has closed its mesh; the thread ends with the last one."""
        if self.is_elastic and rank in self.present:
            self.leave(rank)
        self._open.discard(rank)
        if not self._open:
            self.io.stop()

    def _failed(self, error: BaseException) -> None:
        for mesh in self.meshes:
            mesh.fail(error)


class MemoryMesh(Mesh):
    """One rank of a MemoryWorld. Bytes counted are payload only: there are no headers here."""

    def __init__(self, world: MemoryWorld, rank: int, world_size: int, timeout_s: float) -> None:
        super().__init__(rank, world_size, timeout_s=timeout_s)
        self._world = world
        self._sent = 0
        self._received = 0
        self.has_left = False
        self._is_closed = False

    @property
    def bytes_sent(self) -> int:
        return self._sent

    @property
    def bytes_received(self) -> int:
        return self._received

    def peer_progress(self, peer: int) -> int:
        return self._world.meshes[peer].progress

    def post(self, function: Callable[[], None]) -> None:
        self._world.io.post(function)

    def post_send(self, peer: int, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        self._sent += len(payload.data)
        self._check_present(peer)
        self._world.check_fingerprint(self, peer, tag)
        self._world.match_send((self.rank, peer, tag), payload, on_done)

    def post_recv(self, peer: int, tag: Tag, receive: PostedReceive) -> None:
        self._received += len(receive.payload.data)
        self._check_present(peer)
        self._world.check_fingerprint(self, peer, tag)
        self._world.match_recv((peer, self.rank, tag), receive)

    def _check_present(self, peer: int) -> None:
        if peer not in self.present:
            raise PeerLost(peer, self.generation, "it is not connected")

    @property
    def present(self) -> frozenset[int]:
        if not self._world.is_elastic:
            return super().present
        return frozenset() if self.has_left else self._world.linked(self.rank)

    def _could_not_start(self, work: Work, error: Exception) -> None:
        if self._world.is_elastic and isinstance(error, PeerLost):
            self._pending.discard(work)
            work.finish(error)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """A CollectiveMismatch fails the meshes of all ranks, as no connection ends here."""
        is_new = self.failure is None
        super().fail(error)
        if is_new and isinstance(error, CollectiveMismatch):
            for mesh in self._world.meshes:
                mesh.fail(error)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True

            def end() -> None:
                self.fail(MeshClosed("the mesh was closed"))
                if self._world.meshes[self.rank] is self:
                    self._world.closed(self.rank)

            self.post(end)
