"""The memory of a rank's process before it has a model, measured: a process is started that imports
what a rank imports, uses torch a little, and prints its size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from smolrun.sanitize import echo

# Of a process with torch 2.13 on Linux, where a process of our own could not be started to look.
USUAL_PROCESS = 300 * 2**20
_PROBE = (  # a rank's process imports smolrun.worker.train
    "import smolrun.worker.train; "
    "from smolrun.estimate.process import print_process; print_process()"
)
_PROBE_S = 60.0


@dataclass(frozen=True)
class Process:
    """Memory of a rank before it has a model: all of it, and what ranks of one host share."""

    size: int
    shared: int


def print_process() -> None:
    """For the probe: use torch a little, and print the memory of this process as JSON."""
    layer = nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(2):
        layer(torch.ones(64, 256)).logsumexp(-1).sum().backward()
        optimizer.step()
    memory: Any = psutil.Process().memory_info()
    echo(json.dumps([memory.rss, getattr(memory, "shared", 0)]))


def start_probe() -> subprocess.Popen[bytes] | None:
    """The process that measures itself; None where it cannot be started."""
    try:
        return subprocess.Popen(  # noqa: S603  (our own interpreter, our own code)
            [sys.executable, "-P", "-c", _PROBE],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None


def end_probe(probe: subprocess.Popen[bytes] | None) -> Process | None:
    """What it has found; blocks for a minute at most. None where it found nothing."""
    if probe is None:
        return None
    try:
        output, _ = probe.communicate(timeout=_PROBE_S)
        size, shared = json.loads(output)
        return Process(int(size), int(shared))
    except (subprocess.TimeoutExpired, ValueError):
        probe.kill()
        probe.wait()
        return None
