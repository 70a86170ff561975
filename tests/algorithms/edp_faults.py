"""What the others notice when a worker of edp dies, comes back, or freezes: workers of the speeds
8 : 4 : 2 : 1 in a real run, and how many gradients of each are applied a second.

    python -m tests.algorithms.edp_faults FOLDER [key=value ...]

The workers play slower machines (`emulate`). It writes figures to stdout; the run lies in FOLDER.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.tasks.background import process_of

SPEEDS = (8, 4, 2, 1)
FASTEST = 0.4  # of a core
WINDOW_S = 10.0
FREEZE_S = 10.0


@dataclass
class Watch:
    """Reads metrics.jsonl as it grows; every row gets the time at which it was seen."""

    path: Path
    rows: list[tuple[float, dict[str, object]]] = field(default_factory=list)
    _at: int = 0

    def look(self) -> None:
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            file.seek(self._at)
            while (line := file.readline()).endswith("\n"):
                self._at = file.tell()
                self.rows.append((time.monotonic(), json.loads(line)))

    def pushes(self, since: float, until: float) -> Counter[int]:
        return Counter(
            int(str(row["rank"]))
            for at, row in self.rows
            if row["event"] == "push" and since <= at < until
        )


def cluster(folder: Path) -> None:
    """Five hosts on this machine; the first is the server."""
    hosts = ["  - {name: server}"] + [
        f"  - {{name: w{speed}, emulate: {{compute: {FASTEST * speed / 8:g}}}}}" for speed in SPEEDS
    ]
    file = folder / "conf" / "cluster" / "four.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["# Four unequal workers", "name: four", "hosts:", *hosts, ""]))


def main(folder: Path, *overrides: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cluster(folder)
    command = [sys.executable, "-m", "smolrun.cli", "algorithm=edp", "cluster=four", *overrides]
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        outputs = folder / "outputs"
        while not (outputs / "latest").exists():
            time.sleep(0.1)
        watch = Watch(outputs / "latest" / "metrics.jsonl")

        def pass_time(seconds: float) -> tuple[float, float]:
            began = time.monotonic()
            while time.monotonic() < began + seconds and run.poll() is None:
                watch.look()
                time.sleep(0.05)
            return began, time.monotonic()

        while len(watch.pushes(0, time.monotonic() + 1)) < len(SPEEDS):
            pass_time(0.1)
        windows = {"warming up": pass_time(3)}
        windows["before"] = pass_time(WINDOW_S)
        process_of(2, outputs / "latest").kill()
        windows["one worker killed"] = gone = pass_time(0.5)
        while not watch.pushes(gone[0] + 0.5, time.monotonic()).get(2) and run.poll() is None:
            pass_time(0.1)
        windows["one worker killed"] = (gone[0], time.monotonic())
        windows["after that"] = pass_time(WINDOW_S)
        frozen = process_of(1, outputs / "latest")
        frozen.send_signal(signal.SIGSTOP)
        windows[f"another frozen for {FREEZE_S:g} s"] = pass_time(FREEZE_S)
        try:
            frozen.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            print("the frozen process was ended and started again")
        thawed = time.monotonic()
        while not watch.pushes(thawed, time.monotonic()).get(1) and run.poll() is None:
            pass_time(0.1)
        print(f"its first gradient came {time.monotonic() - thawed:.1f} s after it thawed")
        windows["after it is back again"] = pass_time(WINDOW_S)
        run.send_signal(signal.SIGINT)
        print(run.communicate(timeout=120)[0])
    finally:
        run.kill()
    report(watch, windows)


def report(watch: Watch, windows: dict[str, tuple[float, float]]) -> None:
    """The figures."""
    print("gradients applied a second, by rank (speeds 8 4 2 1):")
    for what, (since, until) in windows.items():
        counts = watch.pushes(since, until)
        rates = "  ".join(f"{counts[rank] / (until - since):6.2f}" for rank in range(1, 5))
        print(f"  {what:45s} {until - since:5.1f} s  {rates}")
    losses = [(row["step"], row["loss"]) for _, row in watch.rows if row["event"] == "step"]
    every = max(1, len(losses) // 12)
    print("loss:", "  ".join(f"{step}: {loss:.3f}" for step, loss in losses[::every]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
