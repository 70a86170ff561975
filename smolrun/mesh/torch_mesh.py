"""The mesh of torch.distributed: its process groups (gloo) carry everything, in place of our own
sockets.

    rank 0     TCPStore at its address in the roster: ranks find each other there
    groups     one process group for each group of collectives, and one for tagged sends
    thread     "mesh-torch" alone starts operations, in the order in which they were asked for

Gloo neither encrypts nor authenticates, sends no heartbeats, and names no rank in its errors. So a
rank keeps its listening socket while it lives, and an error is explained by asking who still
listens, and in the store who has failed because of another one. A frozen rank is found only by
`timeout_s`. Bytes are counted by the formula of each operation, as gloo counts none.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Where torch's own type stubs have them.
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from smolrun.errors import (
    CollectiveMismatch,
    HandshakeError,
    MeshClosed,
    PeerLost,
    SmolrunError,
    WaitTimeout,
)
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.io import IoThread
from smolrun.mesh.mesh import Mesh, PostedReceive, Work
from smolrun.mesh.rendezvous import RosterEntry
from smolrun.wire.frame import Tag
from smolrun.wire.handshake import Identity
from smolrun.wire.tensor import Payload

_log = logging.getLogger(__name__)

_Gloo: Any = ProcessGroupGloo  # torch's type stubs lack its options
TorchWork = Any  # torch.distributed's Work, of which each backend has a class of its own
ProcessGroup = Any  # ProcessGroupGloo, or ProcessGroupNCCL, which a build for the CPU lacks

_EXPLAIN_S = 3.0  # for the other ranks to fail too, and to say so in the store
_PROBE_S = 1.0
_GLOO_THREADS = 2  # of one process group, torch's own default
# A tag of gloo has 31 bits: of the stream, the part of a message, the operation (which wraps).
_STREAM_BITS, _HOP_BITS, _OPERATION_BITS = 5, 12, 14


def is_available() -> bool:
    """Whether this build of torch has gloo; that of Windows on Arm has none."""
    return dist.is_available() and dist.is_gloo_available()


class TorchMesh(Mesh):
    """All ranks of one run on torch.distributed; see `connect_torch`."""

    def __init__(
        self,
        identity: Identity,
        store: Store,
        endpoint: Endpoint,
        roster: Sequence[RosterEntry],
        *,
        timeout_s: float,
    ) -> None:
        """Owns the store and the endpoint. `timeout_s` is that of the process groups; our own waits
        are longer, so that the error is the one that has been explained."""
        super().__init__(
            identity.rank,
            identity.world_size,
            generation=identity.generation,
            timeout_s=timeout_s + 2 * _EXPLAIN_S,
            members=[entry.rank for entry in roster],
        )
        self.io = IoThread("mesh-torch", self.fail)
        self._store = store
        self._endpoint = endpoint
        self._places = {entry.rank: entry.addresses[0] for entry in roster}
        self._options = _Gloo._Options()
        self._options._devices = [_Gloo.create_device(hostname=endpoint.addresses[0][0])]
        self._options._timeout = timedelta(seconds=timeout_s)
        self._options._threads = _GLOO_THREADS
        self._process_groups: dict[str, ProcessGroup] = {}
        self._is_explaining = self._is_closed = False
        self._sent = self._received = 0
        self._counting = threading.Lock()
        self.world: Any = None  # the collectives of the default group
        self.io.start()

    def process_group(self, name: str, ranks: Sequence[int]) -> ProcessGroup:
        """The process group of that name, made once; blocks until all its ranks have called it."""
        if name not in self._process_groups:
            store, index = PrefixStore(name, self._store), list(ranks).index(self.rank)
            try:
                group = _Gloo(store, index, len(ranks), self._options)
            except RuntimeError as error:
                raise self._explained(f"the group {name!r}", str(error)) from None
            self._process_groups[name] = group
        return self._process_groups[name]

    def run(
        self,
        label: str,
        start: Callable[[], TorchWork],
        finish: Callable[[], None] = lambda: None,
    ) -> Work:
        """Starts an operation of torch.distributed on the I/O thread; the work is done when it is,
        after `finish()`, which runs on that thread too."""

        def begin(work: Work) -> None:
            def done() -> None:
                try:
                    finish()
                except SmolrunError as error:  # a mismatch of the ranks' operations
                    self.fail(error)
                else:
                    self.finish(work)

            self.watch(start(), label, done)

        return self.submit(label, begin)

    def watch(self, running: TorchWork, label: str, on_done: Callable[[], None]) -> None:
        """Calls `on_done` on the I/O thread when an operation has ended well; an error of it fails
        the mesh."""

        def ended(future: Any) -> None:  # on a thread of the backend
            try:
                future.value()
            except RuntimeError as error:
                self.post(functools.partial(self._broke, label, str(error)))
            else:
                self.post(on_done)

        running.get_future().add_done_callback(ended)

    def count(self, sent: int, received: int) -> None:
        """Adds bytes of an operation to the counters."""
        with self._counting:  # this thread's, and those of chains on the I/O thread
            self._sent += sent
            self._received += received

    @property
    def bytes_sent(self) -> int:
        return self._sent

    @property
    def bytes_received(self) -> int:
        return self._received

    def peer_progress(self, peer: int) -> int:
        """Unknown: there are no heartbeats."""
        return 0

    def post(self, function: Callable[[], None]) -> None:
        self.io.post(function)

    def post_send(self, peer: int, tag: Tag, payload: Payload, on_done: Callable[[], None]) -> None:
        self.count(len(payload.data), 0)
        self._tagged(self._point_to_point().send, peer, tag, payload, on_done)

    def post_recv(self, peer: int, tag: Tag, receive: PostedReceive) -> None:
        self.count(0, len(receive.payload.data))
        if receive.combine is not None:
            raise SmolrunError("torch.distributed adds nothing while it receives")
        group = self._point_to_point()
        self._tagged(group.recv, peer, tag, receive.payload, receive.on_done)

    def _point_to_point(self) -> ProcessGroup:
        return self._process_groups[_TAGGED]

    def _tagged(
        self,
        start: Callable[..., TorchWork],
        peer: int,
        tag: Tag,
        payload: Payload,
        on_done: Callable[[], None],
    ) -> None:
        """Gloo has no callback for the end of a tagged operation, so a thread waits for it."""
        memory = torch.empty(0, dtype=torch.uint8)
        if len(payload.data):
            memory = torch.frombuffer(payload.data, dtype=torch.uint8)
        running = start([memory], self.members.index(peer), wire_tag(tag))
        label = f"{tag} with rank {peer}"

        def wait() -> None:
            try:
                running.wait()
            except RuntimeError as error:
                self.post(functools.partial(self._broke, label, str(error)))
            else:
                self.post(on_done)

        threading.Thread(target=wait, name="mesh-torch-wait", daemon=True).start()

    def _could_not_start(self, work: Work, error: Exception) -> None:
        if isinstance(error, RuntimeError):  # of torch: a connection is closed already
            self._broke(work.label, str(error))
        else:
            self.fail(error)

    def _broke(self, label: str, text: str) -> None:
        """An operation has failed; the mesh fails once it is known because of whom."""
        if self.failure is not None or self._is_explaining or self._is_closed:
            return
        self._is_explaining = True
        _log.warning("%s failed: %s", label, _first_sentence(text))

        def explain() -> None:
            error = self._explained(label, text)
            self.post(lambda: self.fail(error))

        threading.Thread(target=explain, name="mesh-torch-explain", daemon=True).start()

    def _explained(self, label: str, text: str) -> SmolrunError:
        """What an error of the backend means; blocks for seconds."""
        reason = _first_sentence(text)
        others = [rank for rank in self.members if rank != self.rank]
        failed = self._failures(others, label)
        deadline = time.monotonic() + _EXPLAIN_S
        while True:
            gone = [rank for rank in others if not _listens(self._places[rank])]
            causes = [rank for rank in gone if rank not in failed]
            if causes or time.monotonic() > deadline:
                break
            time.sleep(0.1)
            failed = self._failures(others)
        if causes or gone:
            why = f"its process has ended, or is out of reach ({reason})"
            return PeerLost((causes or gone)[0], self.generation, why)
        for rank, theirs in failed.items():
            # "all_reduce 7 of group 'world'": the same number of another operation.
            if theirs != label and theirs.partition(" ")[2] == label.partition(" ")[2]:
                return CollectiveMismatch((self.rank, rank), (label, theirs))
        silent = [rank for rank in others if rank not in failed]
        if not silent:
            return MeshClosed(f"{label}: torch.distributed failed on all ranks ({reason})")
        what = f"rank {silent[0]} does not do its part, though its process has not ended"
        return WaitTimeout(f"{label}: {what} ({reason})", silent[0])

    def _failures(self, ranks: Sequence[int], own: str | None = None) -> dict[int, str]:
        """The operations that have failed on those ranks, as they say in the store, where this rank
        first adds its `own`. Empty if the store does not answer: then rank 0 is the cause."""
        found: dict[int, str] = {}

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                if own is not None:
                    self._store.set(_FAILED.format(self.rank), own)
                for rank in ranks:
                    if self._store.check([_FAILED.format(rank)]):
                        found[rank] = self._store.get(_FAILED.format(rank)).decode()

        thread = threading.Thread(target=ask, name="mesh-torch-store", daemon=True)
        thread.start()
        thread.join(_PROBE_S)
        return dict(found)

    def _wait_for_others(self, lost: int) -> None:
        """The rank with the store stays until all others know the cause, for a while: they would
        take its own end for that."""
        others = [rank for rank in self.members if rank not in (self.rank, lost)]
        deadline = time.monotonic() + _PROBE_S
        while self.rank == self.members[0] and time.monotonic() < deadline:
            if len(self._failures(others)) == len(others):
                return
            time.sleep(0.02)

    def describe_waiting(self) -> str:
        return f"rank {self.rank} waits in torch.distributed, which does not say for whom"

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if isinstance(self.failure, PeerLost):
            self._wait_for_others(self.failure.rank)
        self.post(lambda: self.fail(MeshClosed("the mesh was closed")))
        self.io.stop()
        self._process_groups.clear()
        self._endpoint.close()


_TAGGED = "point to point"
_FAILED, _MEMBER = "failed {}", "member {}"


def connect_torch(
    endpoint: Endpoint,
    identity: Identity,
    roster: Sequence[RosterEntry],
    *,
    timeout_s: float = 300.0,
    start_timeout_s: float = 60.0,
) -> TorchMesh:
    """Starts torch.distributed among the ranks of the roster; blocks until all are there. Owns the
    endpoint. HandshakeError, or WaitTimeout naming a rank that is missing."""
    if not is_available():
        raise SmolrunError("this build of torch has no gloo; set mesh=tcp")
    try:
        store = _open_store(endpoint, identity, roster, start_timeout_s)
        _check_members(store, identity, roster, start_timeout_s)
        mesh = TorchMesh(identity, store, endpoint, roster, timeout_s=timeout_s)
    except BaseException:
        endpoint.close()
        raise
    try:
        mesh.process_group(_TAGGED, mesh.members)
    except BaseException:
        mesh.close()
        raise
    return mesh


def _open_store(
    endpoint: Endpoint, identity: Identity, roster: Sequence[RosterEntry], timeout_s: float
) -> Store:
    """The store of the first rank, which listens on the socket of its endpoint: no other port."""
    first, timeout = roster[0], timedelta(seconds=timeout_s)
    address, port = first.addresses[0]
    keys: dict[str, Any] = {"timeout": timeout, "wait_for_workers": False}
    if identity.rank == first.rank:
        listening = endpoint.sockets.pop(0).detach()
        keys |= {"is_master": True, "master_listen_fd": listening}
    try:
        return TCPStore(address, port, len(roster), **keys)
    except RuntimeError as error:  # DistNetworkError and its kin
        what = str(error).splitlines()[0]
        raise WaitTimeout(
            f"rank {first.rank} ({first.host}) was not reached at {address}:{port} ({what})",
            None if identity.rank == first.rank else first.rank,
        ) from None


def _check_members(
    store: Store, identity: Identity, roster: Sequence[RosterEntry], timeout_s: float
) -> None:
    """Waits until every rank is in the store, with the same run, configuration and torch."""
    own = f"{identity.run_id} {identity.config_hash} {identity.generation} {torch.__version__}"
    store.set(_MEMBER.format(identity.rank), own)
    deadline = time.monotonic() + timeout_s
    for entry in roster:
        left = timedelta(seconds=max(0.01, deadline - time.monotonic()))
        key = _MEMBER.format(entry.rank)
        try:
            store.wait([key], left)
        except RuntimeError:
            raise WaitTimeout(
                f"rank {entry.rank} ({entry.host}) did not come to torch.distributed within "
                f"{timeout_s:g} s",
                entry.rank,
            ) from None
        found = store.get(key).decode("utf-8", "replace")
        if found != own:
            raise HandshakeError(
                f"rank {entry.rank} ({entry.host}) has another run, configuration or version of "
                f"torch ({found}) than rank {identity.rank} ({own})"
            )


def wire_tag(tag: Tag) -> int:
    """A tag as gloo's 31 bits: different for all operations that can be pending together."""
    if tag.stream >= 1 << _STREAM_BITS or tag.hop >= 1 << _HOP_BITS:
        raise SmolrunError(f"{tag} has no tag in gloo: at most {1 << _HOP_BITS} parts")
    operation = tag.operation % (1 << _OPERATION_BITS)
    return (operation << _HOP_BITS | tag.hop) << _STREAM_BITS | tag.stream


def _first_sentence(text: str) -> str:
    """Of an error of torch, which goes on with its source line, advice and a stack of C++."""
    line = text.strip().partition("\n")[0].partition(". This is typically")[0]
    return line.partition("] ")[2] if line.startswith("[") else line


def _listens(place: tuple[str, int]) -> bool:
    """Whether a process still listens there: its socket ends with it."""
    try:
        socket.create_connection(place, _PROBE_S).close()
    except OSError:
        return False
    return True
