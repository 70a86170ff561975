"""Runs `smolrun` in a process of its own that notes what it starts and which libraries it loads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WATCHED = """
import os, sys
sys.path = [p for p in sys.path if p not in ("", os.getcwd())]  # as the installed command has it
seen = set()
def watch(event, args):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "socket.bind"):
        seen.add(event)
    elif event == "import" and args[0] in ("torch", "transformers", "datasets", "wandb", "hydra"):
        seen.add("import " + args[0])
sys.addaudithook(watch)
from smolrun.cli import main
sys.argv[0] = "smolrun"
code = main()
print("SEEN", sorted(seen), file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended. `seen` is what an audit hook saw it do."""

    code: int
    out: str
    error: str
    seen: str
    wall_s: float


def smolrun(cwd: Path, *arguments: str, environment: dict[str, str] | None = None) -> Done:
    """Run the command line in a folder and wait for its end."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    wall_s = time.perf_counter() - began
    error, _, seen = done.stderr.partition("SEEN ")
    return Done(done.returncode, done.stdout, error, seen.strip(), wall_s)


def quickest(measure: Callable[[], float], enough: float) -> float:
    """The least of up to ten measurements, as other tests may run beside; ends with the first that
    is quick enough."""
    times: list[float] = []
    while len(times) < 10 and (not times or min(times) >= enough):
        times.append(measure())
    print(f"seconds: {', '.join(f'{time:.3f}' for time in times)}")
    return min(times)
