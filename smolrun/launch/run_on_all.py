"""Runs one function on several machines in parallel, and reports all failures, not only the first.

One thread each ("smolrun-mini2-code"): a slow or dead machine does not delay the others.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from smolrun.errors import HostError, HostErrors, SmolrunError

_ROUND_S = 0.2  # how late a Ctrl-C may be noticed: Windows notices none during a wait

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


def run_on_all(machines: Mapping[str, T], act: Callable[[T], R], what: str) -> dict[str, R]:
    """`act` on each, by name; returns what each gave, in the same order, once all have ended.

    One failure is raised as it is, several as HostErrors. `act` must end in its own time: after a
    Ctrl-C the threads are left to themselves, and end when their machine is closed.
    """
    answers: queue.SimpleQueue[tuple[str, R | Exception]] = queue.SimpleQueue()

    def run(name: str, machine: T) -> None:
        try:
            answers.put((name, act(machine)))
        except Exception as error:
            answers.put((name, error))

    for name, machine in machines.items():
        thread = threading.Thread(
            target=run, args=(name, machine), name=f"smolrun-{name}-{what}", daemon=True
        )
        thread.start()
    found: dict[str, R | Exception] = {}
    while len(found) < len(machines):
        try:
            name, answer = answers.get(timeout=_ROUND_S)
        except queue.Empty:
            continue
        found[name] = answer
    results, failures = {}, []
    for name in machines:
        answer = found[name]
        if isinstance(answer, Exception):
            failures.append(
                answer if isinstance(answer, SmolrunError) else _unexpected(name, answer)
            )
        else:
            results[name] = answer
    if failures:
        raise failures[0] if len(failures) == 1 else HostErrors(failures)
    return results


def _unexpected(name: str, error: Exception) -> HostError:
    """An unexpected error, with the machine it came from."""
    log.error("%s failed", name, exc_info=error)
    return HostError(name, f"{type(error).__name__}: {error}")
