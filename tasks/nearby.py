"""task=nearby: the clusters of the local network that wait for machines, and the machines that wait
for a cluster. Nothing is connected to: it shows what they announce of themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

from smolrun.config import RunConfig
from smolrun.launch.nearby.discovery import NOTHING_FOUND, Browser, NearbyService
from smolrun.launch.nearby.remembered import RememberedMachine, RememberedMachines
from smolrun.launch.supervisor_events import EXIT_DONE
from smolrun.sanitize import echo
from smolrun.tracking.formatting import aligned


def drive(config: RunConfig) -> int:
    """Prints what announces itself within nearby.wait_s seconds; exit code 0."""
    with Browser() as browser:
        found = browser.wait_for(lambda found: False, config.nearby.wait_s)
        problem = browser.problem
    known = RememberedMachines().all()
    for line in [*clusters(found, known), *waiting(found, known)]:
        echo(line)
    if not found:
        echo(problem or NOTHING_FOUND)
    return EXIT_DONE


def clusters(found: Sequence[NearbyService], known: Sequence[RememberedMachine] = ()) -> list[str]:
    """A table of the clusters that can be joined, with the command that joins one of them."""
    rows = [
        (
            one.name,
            one.id,
            one.machine,
            f"{one.present} of {one.ranks}",
            f"{one.addresses[0]} port {one.port}",
            one.smolrun or "?",
            _code(one, known),
        )
        for one in found
        if one.role == "coordinator"
    ]
    if not rows:
        return []
    head = ("cluster", "id", "of", "ranks", "address", "smolrun", "joining")
    names = [row[0] for row in rows]
    # Two of one name differ by their ids.
    name = rows[0][0] if names.count(rows[0][0]) == 1 else rows[0][1]
    return [*aligned([head, *rows]), f"smolrun task=join join.name={_quoted(name)}", ""]


def waiting(found: Sequence[NearbyService], known: Sequence[RememberedMachine] = ()) -> list[str]:
    """A table of the machines that run task=join and have no cluster."""
    rows = [
        (one.machine, one.addresses[0], one.smolrun or "?", _remembered(one, known) or "-")
        for one in found
        if one.role == "joiner"
    ]
    head = ("waiting machine", "address", "smolrun", "remembered")
    return aligned([head, *rows]) if rows else []


def _code(one: NearbyService, known: Sequence[RememberedMachine]) -> str:
    return "without a code" if _remembered(one, known) else "by its code"


def _remembered(one: NearbyService, known: Sequence[RememberedMachine]) -> str:
    """The name under which this account remembers it, by what it says of its key: a hint."""
    names = [
        machine.name
        for machine in known
        if machine.role == one.role and one.is_of_key(machine.fingerprint)
    ]
    return names[0] if names else ""


def _quoted(name: str) -> str:
    """As a shell reads it as one word, for names that need no escapes; else the placeholder."""
    if name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        return name
    return "NAME"
