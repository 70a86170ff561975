"""One rank of edp as a process of its own, for tests that kill it.

argv: rank world_size secret(hex) port share
Rank 0 writes each update to stdout as JSON, and stops the run when stdin ends; a worker computes
with `share` of its processor, and leaves when it gets SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any

import torch

from smolrun.algorithms.base import Algorithm
from smolrun.events import to_json
from smolrun.mesh.connect import Endpoint, RosterEntry, connect
from smolrun.parts.step_clock import EmulatedPace
from smolrun.wire.handshake import Identity
from tests.algorithms import parameter_server as ps

MODEL, STEPS = "language_model", 10**6


def leave(*_: Any) -> None:
    raise SystemExit(0)


def stop_at_end_of_input(algorithm: Algorithm) -> None:
    sys.stdin.read()
    algorithm.wants_stop = True


def main() -> None:
    rank, world_size, port = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    signal.signal(signal.SIGTERM, leave)
    server = RosterEntry(0, "local", [("127.0.0.1", port)])
    endpoint = Endpoint(["127.0.0.1"], (port, port) if rank == 0 else None)
    roster = [server] if rank == 0 else [server, RosterEntry(rank, "local", endpoint.addresses)]
    identity = Identity(rank, world_size, "run", "hash", 0, bytes.fromhex(sys.argv[3]))
    mesh = connect(endpoint, identity, roster, elastic=True, silence_s=6.0, heartbeat_s=0.05)
    try:
        more = {"pace": EmulatedPace(float(sys.argv[5]))}
        algorithm = ps.place(mesh, ps.start(MODEL), more=more if rank else None)
        if rank == 0:
            threading.Thread(target=stop_at_end_of_input, args=(algorithm,), daemon=True).start()
        print("ready", flush=True)
        seen = ps.fit(algorithm, MODEL, STEPS, tell=tell if rank == 0 else lambda result: None)
        if rank == 0:
            values = {name: value.tolist() for name, value in seen.parameters.items()}
            print(json.dumps({"parameters": values}), flush=True)
    finally:
        mesh.close()


def tell(result: Any) -> None:
    for event in result.events:
        print(json.dumps(to_json(event)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
