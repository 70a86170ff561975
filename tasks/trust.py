"""task=trust: shows the SSH host key of every host, and adds those that you confirm to known_hosts;
shows the nearby machines that are remembered, and forgets them (trust.forget).

Nothing is logged in to, but for jump hosts, behind which one cannot look otherwise. A new key is
added to your known_hosts file after a yes (or by trust.yes=true, unseen); one that has changed is
replaced after a yes and never otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from smolrun.config import RunConfig
from smolrun.driver.fleet import host_specs
from smolrun.errors import ConfigError, HostError
from smolrun.launch.nearby.remembered import RememberedMachine, RememberedMachines
from smolrun.launch.run_on_all import run_on_all
from smolrun.launch.ssh import host_keys
from smolrun.launch.ssh.host_keys import KnownHosts
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from smolrun.sanitize import echo, one_line
from smolrun.tracking.formatting import aligned

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import HostSpec
    from smolrun.launch.ssh.hop import ScanResult

    Row = ScanResult | HostError  # one SSH server: what was found, or why nothing was

_STATES = {"known": "known", "new": "new", "changed": "CHANGED", "revoked": "REVOKED"}


def drive(config: RunConfig) -> int:
    """Exit code 0 once every host is known, 3 if one is not, 130 where the answers end early."""
    cluster = config.cluster.name
    specs = host_specs(config)
    known = RememberedMachines()
    if config.trust.forget is not None:
        return _forget(known, config.trust.forget)
    machines = known.all()
    for line in remembered_table(machines):
        echo(line)
    if not specs:
        if machines:
            return EXIT_DONE
        raise ConfigError(
            f"no host of cluster={cluster} has an `ssh:`, so none has a key; and no nearby machine "
            "is remembered"
        )
    rows: list[Row] = []
    try:
        # Behind a jump host that is trusted just now, there may be more to see.
        while True:
            rows = _look(specs)
            echo(table(rows))
            if not _decide(rows, cluster, trust_new=config.trust.yes) or not _has_jump(rows):
                break
            echo()
    except (EOFError, KeyboardInterrupt):
        echo("\nstopped; what you answered before is kept")
        return EXIT_STOPPED
    return EXIT_DONE if all(map(_is_known, rows)) else EXIT_FAILED


def remembered_table(machines: Sequence[RememberedMachine]) -> list[str]:
    """The nearby machines that need no code, and what each may do."""
    if not machines:
        return []
    may = {"joiner": "joins your runs", "coordinator": "runs its code here"}
    head = ("nearby machine", "may", "fingerprint", "since")
    rows = [(one.name, may[one.role], one.fingerprint, one.since or "?") for one in machines]
    return [*aligned([head, *rows]), "smolrun task=trust trust.forget=NAME forgets one", ""]


def _forget(known: RememberedMachines, which: str) -> int:
    """Forget all of that name or fingerprint, whatever they may do: less trust is the safe error.
    ConfigError if there is none."""
    found = [one for one in known.all() if which in ("all", one.name, one.fingerprint)]
    if not found and which != "all":
        raise ConfigError(
            f"trust.forget = {one_line(which)}: no nearby machine of that name or fingerprint is "
            "remembered; smolrun task=trust shows them"
        )
    for one in found:
        known.forget(one)
        echo(f"{one.name}: forgotten, it needs a code from now on")
    return EXIT_DONE


def table(rows: Sequence[Row]) -> str:
    """The rows under their titles, each column as wide as its widest cell."""
    cells = [("host", "address", "type", "fingerprint", "state"), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]
        )
        for line in cells
    )


def _cells(row: Row) -> tuple[str, ...]:
    if isinstance(row, HostError):
        return row.host, "-", "-", "-", f"unreachable: {row.what}"
    kind = row.key.kind.removeprefix("ssh-") if row.key else "-"
    fingerprint = row.key.fingerprint if row.key else "-"
    state = _STATES.get(row.state, f"unreachable: {row.why}")
    return row.name, row.settings.place, kind, fingerprint, state


def _look(specs: Iterable[HostSpec]) -> list[Row]:
    """All hosts at once; every SSH server once, however many hosts are behind it."""
    from smolrun.launch.ssh.connect import scan

    def look(spec: HostSpec) -> Sequence[Row]:
        try:
            return scan(spec)
        except HostError as error:  # its `ssh:` or the ssh_config is invalid
            return [error]

    found = run_on_all({spec.name: spec for spec in specs}, look, "trust")
    return list(dict.fromkeys(chain.from_iterable(found.values())))


def _decide(rows: Sequence[Row], cluster: str, *, trust_new: bool) -> bool:
    """Ask about what is new or has changed; whether anything was written down."""
    scanned = [row for row in rows if not isinstance(row, HostError)]
    open_rows = [row for row in scanned if row.state in ("new", "changed")]
    if not open_rows:
        return False
    echo(_how_to_compare(open_rows))
    is_asking = sys.stdin.isatty()
    written = False
    for row in open_rows:
        if _is_known(row):  # under another name, by an answer just given
            continue
        if row.state == "new":
            question = f"trust the key of {row.name} from now on? [y/N] "
            if trust_new or (is_asking and _says_yes(question, "y")):
                written |= _write(row, _add)
        elif row.state == "changed":
            echo(_what_changed(row))
            question = f"put the new key of {row.name} in place of the old? type yes in full: "
            if is_asking and _says_yes(question, "yes"):
                written |= _write(row, _replace)
    if not is_asking and not (trust_new and written):
        echo(
            "not a terminal, cannot prompt, so nothing was trusted: run this in a terminal, or "
            f"smolrun task=trust cluster={cluster} trust.yes=true to trust all new keys unseen; "
            "a key that has changed is only replaced in a terminal"
        )
    return written


def _how_to_compare(rows: Iterable[ScanResult]) -> str:
    kinds = {row.key.kind.removeprefix("ssh-").split("-")[0] for row in rows if row.key}
    files = " or ".join(f"/etc/ssh/ssh_host_{kind}_key.pub" for kind in sorted(kinds))
    return (
        "compare each fingerprint with what that machine itself says, at its own keyboard, "
        f"to `ssh-keygen -lf {files}`"
    )


def _says_yes(question: str, least: str) -> bool:
    return input(question).strip().lower() in {least, "yes"}


def _what_changed(row: ScanResult) -> str:
    settings = row.settings
    known = KnownHosts(settings.user_files)
    lines = [f"the key of {row.name} ({settings.place}) has CHANGED:"]
    for key in row.before:
        at = [f"{line.file} line {line.number + 1}" for line in known.where(settings.entry, key)]
        lines.append(f"  was  {key}   {', '.join(at) or 'in a file of this whole system'}")
    lines.append(f"  is   {row.key}")
    lines.append(
        "either that machine was set up anew, or another one answers at its address and could "
        "listen to all you send"
    )
    return "\n".join(lines)


def _write(row: ScanResult, write: Callable[[ScanResult], None]) -> bool:
    files = row.settings.user_files  # the first one is written to
    if not files:
        echo(f"{row.name}: your ssh_config says `UserKnownHostsFile none`, so no key can be kept")
        return False
    try:
        write(row)
    except OSError as error:
        echo(f"{row.name}: cannot write {error.filename or files[0]}: {error.strerror}")
        return False
    echo(f"{row.name}: its key is in {files[0]} now")
    return True


def _add(row: ScanResult) -> None:
    assert row.key is not None, "only rows with a key are asked about"
    host_keys.add_entry(row.settings.user_files[0], row.settings.entry, row.key)


def _replace(row: ScanResult) -> None:
    entry, known = row.settings.entry, KnownHosts(row.settings.user_files)
    old = [line for key in row.before for line in known.where(entry, key)]
    host_keys.remove_entries(old, entry)
    _add(row)


def _is_known(row: Row) -> bool:
    """As the files are now."""
    if isinstance(row, HostError) or row.key is None or row.state == "revoked":
        return False
    known = KnownHosts(row.settings.user_files)
    return row.state == "known" or row.key in known.keys(row.settings.entry)


def _has_jump(rows: Iterable[Row]) -> bool:
    return any(not isinstance(row, HostError) and row.is_jump for row in rows)
