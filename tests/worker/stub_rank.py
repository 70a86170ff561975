"""The real worker entry point with a stub for torch, mesh and task, so that it starts in 0.1 s.

`config["act"]` names what the stub of the task does.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
import types
from typing import Any

from smolrun.errors import PeerLost, StopRequested, TrainingError
from smolrun.events import StepDone


class Mesh:
    def __init__(
        self,
        endpoint: Endpoint,
        identity: Any,
        roster: list[Any],
        security: None,
        is_outdated: object,
        **settings: float,
    ) -> None:
        assert endpoint.host == "local"
        assert identity.secret == bytes.fromhex("5e" * 32)
        assert [(seat.rank, seat.addresses) for seat in roster] == [(0, [("127.0.0.1", 4711)])]
        print("mesh", *(f"{key}={value}" for key, value in sorted(settings.items())))

    def close(self) -> None:
        print("mesh closed")
        if "close" in os.environ.get("STUB_FAULT", ""):
            raise OSError("cannot close")


class Endpoint:
    def __init__(self, addresses: list[str], ports: None, *, host: str) -> None:
        assert (addresses, ports) == (["127.0.0.1"], None)
        self.host = host
        self.addresses = [("127.0.0.1", 4711)]


def work(start: Any, mesh: Mesh, channel: Any) -> dict[str, Any]:
    task = start.config["act"]
    print("this goes to the log", task)
    if task == "lost":
        raise PeerLost(1, 0, "silent for 10 s")
    if task == "training_error":
        raise TrainingError("the loss is no number")
    if task == "defect":
        raise ValueError("shapes\ndo not fit")
    if task == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        bytearray(2 << 30)
    if task == "exit":
        sys.exit("user code calls sys.exit")
    if task == "stop_requested":
        channel.stop_requested.wait(20)
        raise StopRequested("stopped between two steps")
    if task == "was_stopped":
        channel.stop_requested.wait(20)
        return {"was_stopped": True, "steps": 3}
    if task == "thread_left_behind":
        threading.Thread(target=time.sleep, args=(600,)).start()
    channel.emit(StepDone(0, 1.0, 2.5, 1.0, 0.1, 8, 8.0, 0, 0, 0.1, 0.0))
    return {"steps": 1}


def roster_entry(rank: int, host: str, addresses: list[Any]) -> types.SimpleNamespace:
    return types.SimpleNamespace(rank=rank, addresses=addresses)


def stub(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


if __name__ == "__main__":
    stub("torch", set_num_threads=lambda count: print("threads", count), __version__="2.0-stub")
    stub("smolrun.mesh.connect", Endpoint=Endpoint, connect=Mesh, RosterEntry=roster_entry)
    stub("smolrun.wire.handshake", Identity=types.SimpleNamespace)
    stub("smolrun.tasks.train", work=work)
    from smolrun.worker import process

    sys.exit(process.main())
