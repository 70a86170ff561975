"""A worker without torch and mesh, for tests: it does what `config["behave"][rank]` says.

It leaves its pid in `config["folder"]`, where the tests look. Where the config is a real one, the
environment (TINY_CONFIG) holds these keys.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from smolrun.errors import SmolrunError
from smolrun.events import RankStep, StepDone
from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import LEASE_LIMIT_S, Address, ErrorReport, StartMessage


def main() -> int:
    if os.environ.get("TINY_NOISE"):  # before the channel is there, as a login script would
        os.write(1, b"Welcome to this host!\n")
    lease_limit_s = float(os.environ.get("TINY_LEASE_S", LEASE_LIMIT_S))
    channel = WorkerChannel.take_stdio(lease_limit_s=lease_limit_s)
    start = channel.wait_start(30.0)
    config = json.loads(os.environ.get("TINY_CONFIG", "null")) or start.config
    folder = Path(config["folder"])
    behave = config["behave"].get(str(start.rank), "train")
    leave(folder / f"pid{start.rank}", os.getpid())
    if behave == "never_ready":
        sleep_forever()
    if behave == "exit_early":
        print("no such thing as a GPU", file=sys.stderr)
        return 7
    ours = [Address(address, 5000 + start.rank) for address in start.addresses]
    channel.ready(ours, {"python": "3.11"})
    channel.wait_membership(30.0)
    leave(folder / f"running{start.rank}", os.getpid())
    return act(behave, config["steps"], start, channel, folder)


def act(behave: str, steps: int, start: StartMessage, channel: WorkerChannel, folder: Path) -> int:
    if behave == "print":
        print("this is no JSON")
        os.write(1, b"neither is this\n")
        subprocess.run(
            [sys.executable, "-c", "import sys; print(sys.stdin.read() == '')"], check=True
        )
    elif behave == "garbage":
        os.write(channel._write_fd, b"%% not json %%\n")
        sleep_forever()
    elif behave == "endless_line":
        with channel._write_lock:  # else its answers to leases end the line
            while True:
                os.write(channel._write_fd, b"x" * 65536)
    elif behave == "raise":
        channel.result("failed", error=ErrorReport("ValueError", "shapes do not fit"))
        return 3
    elif behave == "lose_1":
        run_steps(start, channel, 5)
        channel.result("failed", error=ErrorReport("PeerLost", "lost rank 1: silent for 4 s", 1))
        return 3
    elif behave == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        leave(folder / "child", child.pid)
    elif behave == "chatty":
        while True:
            os.write(2, b"x" * 4095 + b"\n")  # whole pages: a full pipe has not a byte of room
    elif behave == "hoard":
        run_steps(start, channel, 2)
        hoard = []
        while True:
            hoard.append(bytearray(4 << 20))
    elif behave == "ignore_stop":
        channel.stop_requested.clear = channel.stop_requested.set  # type: ignore[method-assign]
        sleep_forever()
    elif behave == "hang_after_result":
        channel.result("done", summary={})
        sleep_forever()
    elif behave.startswith("stream"):
        return read_stream(start, channel, steps, float(behave.removeprefix("stream") or 10))
    stopped = run_steps(start, channel, steps)
    channel.result("stopped" if stopped else "done", summary={"rank": start.rank})
    return 0


def run_steps(start: StartMessage, channel: WorkerChannel, steps: int) -> bool:
    """Events as training makes them; True if it was stopped."""
    for step in range(steps):
        channel.emit(RankStep(step, start.rank, 0.01, 0.0, None, 0, 0))
        channel.emit(StepDone(step, 0.01 * step, 1.0, 1.0, 0.1, 8, 800.0, 0, 0, 0.01, 0.0))
        if channel.stop_requested.wait(0.01):
            return True
    return False


def read_stream(start: StartMessage, channel: WorkerChannel, steps: int, timeout_s: float) -> int:
    """Two rows of every step, asked for two steps ahead; the result tells their first bytes."""
    from smolrun.launch.streams import StreamClient  # only here: a worker starts in 0.1 s

    rows = StreamClient(channel)
    firsts = [2 * (step * start.world_size + start.rank) for step in range(steps)]
    share = [range(first, first + 2) for first in firsts]
    seen: list[int] = []
    try:
        for step in range(-2, steps):
            if step + 2 < steps:
                next_first = share[step + 3].start if step + 3 < steps else None
                rows.request(share[step + 2].start, share[step + 2].stop, next_first)
            if step >= 0:
                data = rows.take(share[step].start, share[step].stop, timeout_s)
                seen += [int.from_bytes(part, "little") for part in (data[:4], data[-4:])]
                channel.emit(RankStep(step, start.rank, 0.01, 0.0, None, 0, 0))
    except SmolrunError as error:
        channel.result("failed", error=ErrorReport(type(error).__name__, str(error)))
        return 3
    channel.result("done", summary={"rows": seen})
    return 0


def leave(path: Path, pid: int) -> None:
    """Write a pid so that whoever sees the file sees all of it."""
    part = path.with_suffix(".part")
    part.write_text(str(pid))
    part.rename(path)


def sleep_forever() -> None:
    while True:
        time.sleep(60)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
