"""task=trust: shows the SSH host key of every host, and adds those that you confirm to known_hosts.

Nothing is logged in to, but for jump hosts, behind which one cannot look otherwise. A new key is
added to your known_hosts file after a yes (or by trust.yes=true, unseen); one that has changed is
replaced after a yes and never otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from smolrun.config import RunConfig
from smolrun.config.cluster import ClusterConfig
from smolrun.errors import ConfigError, HostError
from smolrun.launch.run_on_all import run_on_all
from smolrun.launch.ssh import host_keys
from smolrun.launch.ssh.host_keys import HostKey, KnownHosts
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from smolrun.sanitize import echo

_STATES = {"known": "known", "new": "new", "changed": "CHANGED", "revoked": "REVOKED"}


@dataclass(frozen=True)
class Row:
    """One SSH server: what was found, or why nothing was."""

    name: str
    place: str = ""
    entry: str = ""
    state: str = "unreachable"
    key: HostKey | None = None
    before: tuple[HostKey, ...] = ()
    files: tuple[Path, ...] = ()  # the user's own known_hosts files; the first one is written to
    why: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """Host, address, type, fingerprint, state."""
        kind = self.key.kind.removeprefix("ssh-") if self.key else "-"
        fingerprint = self.key.fingerprint if self.key else "-"
        state = _STATES.get(self.state, f"unreachable: {self.why}")
        return self.name, self.place or "-", kind, fingerprint, state


def drive(config: RunConfig) -> int:
    """Exit code 0 once every host is known, 3 if one is not, 130 where the answers end early."""
    cluster = config.cluster
    targets = {host.name: host.ssh for host in cluster.hosts or [] if host.ssh is not None}
    if not targets:
        raise ConfigError(f"no host of cluster={cluster.name} has an `ssh:`, so none has a key")
    rows: list[Row] = []
    try:
        # Behind a jump host that is trusted just now, there may be more to see.
        while True:
            rows = _look(cluster, targets)
            echo(table(rows))
            if not _decide(rows, cluster.name, trust_new=config.trust.yes) or not _has_jump(rows):
                break
            echo()
    except (EOFError, KeyboardInterrupt):
        echo("\nstopped; what you answered before is kept")
        return EXIT_STOPPED
    left = [row for row in rows if not _is_known(row)]
    return EXIT_FAILED if left else EXIT_DONE


def table(rows: Sequence[Row]) -> str:
    """The rows under their titles, each column as wide as its widest cell."""
    cells = [("host", "address", "type", "fingerprint", "state"), *(row.cells for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]
        )
        for line in cells
    )


def _look(cluster: ClusterConfig, targets: dict[str, str]) -> list[Row]:
    """All hosts at once; every SSH server once, however many hosts are behind it."""
    from smolrun.launch.ssh.connect import scan

    def look(name: str) -> list[Row]:
        try:
            found = scan(
                name,
                targets[name],
                ssh_config=cluster.ssh_config,
                timeout_s=cluster.connect_timeout_s,
                cluster=cluster.name,
            )
        except HostError as error:
            return [Row(name, targets[name], why=error.what)]
        return [
            Row(
                one.name,
                one.settings.place,
                one.settings.entry,
                one.state,
                one.key,
                one.before,
                tuple(one.settings.user_files),
                one.why,
            )
            for one in found
        ]

    found = run_on_all({name: name for name in targets}, look, "trust")
    return list(dict.fromkeys(chain.from_iterable(found.values())))


def _decide(rows: Sequence[Row], cluster: str, *, trust_new: bool) -> bool:
    """Ask about what is new or has changed; whether anything was written down."""
    open_rows = [row for row in rows if row.state in ("new", "changed")]
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


def _how_to_compare(rows: Iterable[Row]) -> str:
    kinds = {row.key.kind.removeprefix("ssh-").split("-")[0] for row in rows if row.key}
    files = " or ".join(f"/etc/ssh/ssh_host_{kind}_key.pub" for kind in sorted(kinds))
    return (
        "compare each fingerprint with what that machine itself says, at its own keyboard, "
        f"to `ssh-keygen -lf {files}`"
    )


def _says_yes(question: str, least: str) -> bool:
    return input(question).strip().lower() in {least, "yes"}


def _what_changed(row: Row) -> str:
    known = KnownHosts(row.files)
    lines = [f"the key of {row.name} ({row.place}) has CHANGED:"]
    for key in row.before:
        at = [f"{line.file} line {line.number + 1}" for line in known.where(row.entry, key)]
        lines.append(f"  was  {key}   {', '.join(at) or 'in a file of this whole system'}")
    lines.append(f"  is   {row.key}")
    lines.append(
        "either that machine was set up anew, or another one answers at its address and could "
        "listen to all you send"
    )
    return "\n".join(lines)


def _write(row: Row, write: Callable[[Row], None]) -> bool:
    if not row.files:
        echo(f"{row.name}: your ssh_config says `UserKnownHostsFile none`, so no key can be kept")
        return False
    try:
        write(row)
    except OSError as error:
        echo(f"{row.name}: cannot write {error.filename or row.files[0]}: {error.strerror}")
        return False
    echo(f"{row.name}: its key is in {row.files[0]} now")
    return True


def _add(row: Row) -> None:
    assert row.key is not None, "only rows with a key are asked about"
    host_keys.add_entry(row.files[0], row.entry, row.key)


def _replace(row: Row) -> None:
    known = KnownHosts(row.files)
    old = [line for key in row.before for line in known.where(row.entry, key)]
    host_keys.remove_entries(old, row.entry)
    _add(row)


def _is_known(row: Row) -> bool:
    """As the files are now."""
    return row.key is not None and (
        row.state == "known"
        or (row.state != "revoked" and row.key in KnownHosts(row.files).keys(row.entry))
    )


def _has_jump(rows: Sequence[Row]) -> bool:
    return any(row.name.endswith("(jump host)") for row in rows)
