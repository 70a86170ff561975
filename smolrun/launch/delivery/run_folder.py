"""The run's folder on a host, until its end: the checkpoint it resumes from, and what it saves.

runs/<run_id>/resume/<key>/     a checkpoint, brought there
runs/<run_id>/checkpoints/      what the ranks write, until shards.py has fetched it
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from smolrun.checkpoints.find import read_manifest
from smolrun.checkpoints.manifest import MANIFEST_FILE
from smolrun.errors import CheckpointError
from smolrun.launch.delivery.files import FileHashes
from smolrun.launch.delivery.store import Bundle, File, TransferProgress, deliver_bundles

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import Machine

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
_CLEAR_S = 60.0


def run_on_host(machine: Machine, run_id: str) -> str:
    """The run's folder on the host."""
    if not _RUN_ID.fullmatch(run_id):
        raise CheckpointError(f"{run_id[:80]!r} cannot be the name of a folder on hosts")
    return f"{machine.workdir}/runs/{run_id}"


class CheckpointFiles:
    """A checkpoint of the driver, to be brought to each host; its hashes are in its manifest."""

    def __init__(self, folder: Path) -> None:
        """CheckpointError if the manifest does not verify."""
        files = {
            name: File(folder / name, entry.bytes, entry.sha256)
            for name, entry in read_manifest(folder).files.items()
        }
        files[MANIFEST_FILE] = FileHashes().file(folder / MANIFEST_FILE)
        self._bundle = Bundle(folder.name, files)

    def deliver(self, machine: Machine, transfer: TransferProgress, run: str) -> str:
        """Have it in the run's folder `run` on the host, whole; returns where it lies there."""
        root = f"{run}/resume"
        deliver_bundles(machine, root, [self._bundle], transfer)
        return f"{root}/{self._bundle.key}"


def clear_run(machine: Machine, run_id: str) -> bool:
    """Remove all that the run has on the host; False if something of it could not be removed."""
    request = {"do": "clear", "folder": run_on_host(machine, run_id)}
    return not machine.call("run_folder", request, timeout_s=_CLEAR_S)["left"]
