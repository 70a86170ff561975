"""Builds the mesh over TCP: a closed one, or an elastic one.

endpoint = Endpoint(["10.0.0.2"])             listens; its addresses go into the roster
mesh = connect(endpoint, identity, roster)    blocks until every link is authenticated

The roster may be a part of the ranks. When one is lost, or one is to be added, the ranks close the
mesh, listen again and connect as the next generation, with the roster of those that are there. All
its links are new, and the handshake refuses a rank of any other generation, so nothing that was
sent in an earlier one can be read in it.
"""

from __future__ import annotations

from collections.abc import Callable

from smolrun.mesh.elastic import ElasticMesh
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.link import Pipe
from smolrun.mesh.rendezvous import Rendezvous, RosterEntry
from smolrun.mesh.tcp import TcpMesh
from smolrun.mesh.tls import TransportSecurity
from smolrun.wire.handshake import Identity

__all__ = ["Endpoint", "RosterEntry", "connect"]


def connect(
    endpoint: Endpoint,
    identity: Identity,
    roster: list[RosterEntry],
    *,
    timeout_s: float = 300.0,
    silence_s: float = 10.0,
    heartbeat_s: float = 0.25,
    start_timeout_s: float = 60.0,
    security: TransportSecurity | None = None,
    wrap: Callable[[Pipe, int, str], Pipe] | None = None,
    elastic: bool = False,
    is_outdated: Callable[[], bool] = lambda: False,
) -> TcpMesh:
    """Builds the mesh; blocks until it is complete. Raises HandshakeError, or WaitTimeout naming
    the ranks that are missing. Owns the endpoint.

    `timeout_s` is the deadline of a wait, `silence_s` how long a peer may send nothing at all
    before it counts as lost. `security` makes pipes of sockets; None: without encryption.
    `wrap(pipe, rank, channel)` may put something between frames and pipes (faults, shaping).
    `is_outdated()`: whether a later generation has been announced, which ends the wait with
    GenerationEnded. `elastic` makes an ElasticMesh; where the roster holds this rank alone, it
    returns at once and admits the other ranks from then on."""
    times = {"timeout_s": timeout_s, "silence_s": silence_s, "heartbeat_s": heartbeat_s}
    if elastic and [entry.rank for entry in roster] == [identity.rank]:
        listening = ElasticMesh(identity, **times)
        listening.listen(endpoint, identity, security, wrap)
        return listening
    members = [entry.rank for entry in roster]
    mesh = ElasticMesh(identity, **times) if elastic else TcpMesh(identity, members, **times)
    try:
        rendezvous = Rendezvous(mesh.io, endpoint, identity, roster, security, is_outdated)
        pipes = rendezvous.run(start_timeout_s)
        if wrap is not None:
            pipes = {
                rank: {name: wrap(pipe, rank, name) for name, pipe in channels.items()}
                for rank, channels in pipes.items()
            }
        mesh.adopt(pipes)
    except BaseException:
        mesh.close()
        raise
    finally:
        endpoint.close()
    return mesh
