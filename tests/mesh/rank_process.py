"""One rank as a process of its own, for tests that kill it: all_reduces without end, one line per
event on stdout.

argv: rank world_size secret(hex) silence_s port0,port1,... [hold] [tls]
"hold" keeps the GIL of rank 1 for 2 s every 30 steps; "tls": credentials are on stdin, as JSON
"""

from __future__ import annotations

import json
import sys
import time

import torch

from smolrun.collectives.api import new_group
from smolrun.errors import SmolrunError
from smolrun.mesh.certificates import Credentials
from smolrun.mesh.connect import Endpoint, RosterEntry, connect
from smolrun.mesh.tls import MutualTls
from smolrun.wire.handshake import Identity


def hold_gil(seconds: float) -> None:
    """Makes C calls that do not let go of the GIL, longer and longer, until one took so long."""
    count, taken = 10_000_000, 0.0
    while taken < seconds:
        started = time.perf_counter()
        sum(range(count))
        taken = time.perf_counter() - started
        count = int(count * min(2.0, max(1.2, 1.2 * seconds / taken)))


def main() -> None:
    """Runs until it fails or is killed."""
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    ports = [int(port) for port in sys.argv[5].split(",")]
    roster = [
        RosterEntry(other, "local", [("127.0.0.1", port)]) for other, port in enumerate(ports)
    ]
    identity = Identity(rank, world_size, "run", "hash", 0, bytes.fromhex(sys.argv[3]))
    security = (
        MutualTls(Credentials(**json.load(sys.stdin)), identity) if "tls" in sys.argv else None
    )
    mesh = connect(
        Endpoint(["127.0.0.1"], (ports[rank], ports[rank])),
        identity,
        roster,
        silence_s=float(sys.argv[4]),
        security=security,
    )
    collectives = new_group(mesh)
    tensor = torch.ones(2_000_000)
    limit = 40 if "hold" in sys.argv else 10**9
    try:
        for step in range(limit):
            if "hold" in sys.argv and rank == 1 and step % 30 == 10:
                hold_gil(2.0)
            collectives.all_reduce(tensor)
            if step in (0, 5):
                print(f"step {step}", flush=True)
        collectives.barrier()
        print(f"done gap {mesh.io.longest_gap_s:.2f}", flush=True)
    except SmolrunError as error:
        print(f"error {time.time():.3f} {error}", flush=True)
    mesh.close()


main()
