"""A fake stage as a process of its own, for tests that kill or freeze it; prints how it ended.

argv: rank secret(hex) silence_s port0,port1,...
"""

from __future__ import annotations

import sys
import time

from smolrun.errors import SmolrunError
from smolrun.mesh.connect import Endpoint, RosterEntry, connect
from smolrun.mesh.mesh import Mesh
from smolrun.serving.pipeline import run_stage
from smolrun.serving.stage_runner import StageTimes
from smolrun.wire.handshake import Identity
from tests.serving.fake_stage import FakeStage
from tests.serving.test_engine import CAPACITY, SLOTS, stats_of


class SlowStage(FakeStage):
    """A stage that takes a while, so that an answer is under way when it is lost."""

    def run(self, *given: object) -> object:  # type: ignore[override]
        time.sleep(0.05)
        return super().run(*given)  # type: ignore[arg-type]


def join(rank: int, secret: str, silence_s: float, ports: list[int]) -> Mesh:
    """The mesh of this rank; blocks until all ranks are there."""
    roster = [
        RosterEntry(other, "local", [("127.0.0.1", port)]) for other, port in enumerate(ports)
    ]
    return connect(
        Endpoint(["127.0.0.1"], (ports[rank], ports[rank])),
        Identity(rank, len(ports), "run", "hash", 0, bytes.fromhex(secret)),
        roster,
        silence_s=silence_s,
    )


def main() -> None:
    """Runs until rank 0 ends it, a peer is lost, or it is killed."""
    rank, ports = int(sys.argv[1]), [int(port) for port in sys.argv[4].split(",")]
    mesh = join(rank, sys.argv[2], float(sys.argv[3]), ports)
    stage = SlowStage(rank, len(ports), slots=SLOTS, capacity=CAPACITY)
    times = StageTimes(stats_of(rank))
    try:
        run_stage(mesh, list(range(len(ports))), stage, times)
        print("ended", flush=True)
    except SmolrunError as error:
        print(f"error {error}", flush=True)
    mesh.close()


if __name__ == "__main__":
    main()
