"""An elastic run in one process, whose workers come and go when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from smolrun.algorithms.base import Algorithm
from smolrun.errors import MeshClosed, PeerLost
from smolrun.mesh.memory import MemoryWorld
from tests.algorithms import parameter_server as ps
from tests.waiting import until


class Crew:
    """Rank 0 and workers, each a thread; `gates[rank]` lets a worker begin so many work items."""

    def __init__(self, world_size: int, *here: int, model: str, steps: int, **place: Any) -> None:
        self.world = MemoryWorld(world_size, elastic=True, present={0, *here})
        self.model = model
        self.steps = steps
        self.start: nn.Module = ps.start(model, place.get("precision", "float64"))
        self.algorithms: dict[int, Algorithm] = {}
        self.seen: dict[int, ps.Seen] = {}
        self.ended: dict[int, BaseException] = {}
        self.begun: dict[int, int] = dict.fromkeys(range(world_size), 0)  # rank -> items
        self.gates: dict[int, threading.Semaphore] = {}
        self._place = place
        self._threads: list[threading.Thread] = []

    def begin(
        self,
        rank: int,
        *,
        gate: int | None = None,
        resume: Callable[[Algorithm], None] | None = None,
    ) -> None:
        """A rank that is here starts to train; with a gate only so many items for now."""
        if gate is not None:
            self.gates[rank] = threading.Semaphore(gate)
        algorithm = ps.place(self.world.meshes[rank], self.start, **self._place)
        if resume is not None:
            resume(algorithm)
        self.algorithms[rank] = algorithm
        thread = threading.Thread(target=self._run, args=(rank, algorithm), daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self, rank: int) -> None:
        """A rank comes, or comes back."""
        self.gates.pop(rank, None)
        self.world.join(rank)
        until(lambda: rank in self.world.present)
        self.begin(rank)

    def kill(self, rank: int) -> None:
        """A rank dies at once."""
        self.world.leave(rank, "it was killed")
        until(lambda: rank not in self.world.present)

    def server(self) -> ps.Seen:
        """What rank 0 has seen, once the run is over."""
        until(lambda: 0 in self.seen or 0 in self.ended, timeout_s=30)
        if 0 in self.ended:
            raise self.ended[0]
        return self.seen[0]

    def _run(self, rank: int, algorithm: Algorithm) -> None:
        mesh = algorithm.context.mesh

        def before(count: int) -> None:
            gate = self.gates.get(rank)
            while gate is not None and not gate.acquire(timeout=0.05):
                if rank not in self.world.present or rank not in self.gates:
                    break
            self.begun[rank] += 1

        try:
            self.seen[rank] = ps.fit(algorithm, self.model, self.steps, before=before)
        except (PeerLost, MeshClosed) as error:
            self.ended[rank] = error
        except BaseException as error:
            self.ended[rank] = error
            raise
        finally:
            mesh.close()


@contextmanager
def crew(
    world_size: int, *here: int, model: str = "mlp", steps: int = 10, **place: Any
) -> Iterator[Crew]:
    made = Crew(world_size, *here, model=model, steps=steps, **place)
    try:
        yield made
    finally:
        made.gates.clear()
        for mesh in made.world.meshes:
            mesh.close()
        for thread in made._threads:
            thread.join(10)
            assert not thread.is_alive()
