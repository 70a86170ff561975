"""Brings the code of a run to a host, the way `cluster.deploy` asks for.

wheel   code/<sha16>/   one archive, only if that code is not there yet
rsync   tree/           one readable tree, only the files that differ
none    -               the host has smolrun itself
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from smolrun.errors import HostError
from smolrun.launch.delivery.code_archive import LIB, OWN, CodeArchive
from smolrun.launch.delivery.store import (
    TransferProgress,
    ask,
    check_room,
    check_whole,
    dropped_on_error,
    put,
)

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import Machine

Deploy = Literal["none", "rsync", "wheel"]

_KEPT, _YOUNGER_S = 5, 86_400.0
_ZIP = "code.zip"


@dataclass(frozen=True)
class HostCode:
    """Where the code lies on a host: `lib` goes first on the path (empty: it has its own), and
    a worker runs in the folder `own`, which is the last on its path."""

    lib: str
    own: str


def deliver_code(
    machine: Machine,
    archive: CodeArchive,
    deploy: Deploy,
    *,
    run: str | None = None,
    transfer: TransferProgress | None = None,
) -> HostCode:
    """Have the code on the host, and say where. `run` is the run's folder there, if it has one:
    it keeps the code from being pruned. HostError says what is in the way."""
    transfer = transfer or TransferProgress("code to hosts")
    if deploy == "none":
        return HostCode("", machine.home)
    folder = (
        _tree(machine, archive, transfer)
        if deploy == "rsync"
        else _by_hash(machine, archive, run, transfer)
    )
    return HostCode(f"{folder}/{LIB}", f"{folder}/{OWN}")


def _by_hash(
    machine: Machine, archive: CodeArchive, run: str | None, transfer: TransferProgress
) -> str:
    key, root = archive.digest[:16], f"{machine.workdir}/code"
    wanted = {"root": root, "wanted": {key: archive.listing}}
    answer = ask(machine, "store", {"do": "look", **wanted, "thorough": True, "run": run})
    if answer["missing"]:
        place = {**wanted, "incoming": answer["incoming"]}
        with dropped_on_error(machine, "store", place):
            _send(machine, archive.pack(), place["incoming"], answer["free"], transfer)
            finish = {"archive": _ZIP, "keep": _KEPT, "younger_s": _YOUNGER_S}
            check_whole(machine, ask(machine, "store", {"do": "finish", **place, **finish}))
    return f"{root}/{key}"


def _tree(machine: Machine, archive: CodeArchive, transfer: TransferProgress) -> str:
    root = f"{machine.workdir}/tree"
    wanted = {"root": root, "listing": archive.listing}
    answer = ask(machine, "tree", {"do": "look", **wanted})
    if not set(answer["changed"]) <= archive.listing.keys():
        raise HostError(machine.name, "asks for files that are not part of our code")
    if answer["incoming"]:
        place = {**wanted, "incoming": answer["incoming"]}
        with dropped_on_error(machine, "tree", place):
            if answer["changed"]:
                data = archive.pack(answer["changed"])
                _send(machine, data, place["incoming"], answer["free"], transfer)
            finish = {"archive": _ZIP, "changed": answer["changed"]}
            check_whole(machine, ask(machine, "tree", {"do": "finish", **place, **finish}))
    return root


def _send(
    machine: Machine, data: bytes, incoming: str, free: int, transfer: TransferProgress
) -> None:
    check_room(machine, machine.workdir, len(data), free)
    transfer.add(len(data))
    put(machine, data, f"{incoming}/{_ZIP}", len(data), transfer.on_bytes)
