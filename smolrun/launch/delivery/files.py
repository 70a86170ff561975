"""Data and models, delivered by content: a host that has them already gets nothing.

    files/<sha256>/<name>     a file under the hash of its bytes, a folder under that of its listing

The driver fetched them, so no token is ever needed on a host.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from smolrun.data.prepared import Prepared
from smolrun.files import atomic_write, file_hash
from smolrun.launch.delivery.store import Bundle, File, TransferProgress, deliver_bundles

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import Machine

# What no run used for so long goes when something new comes.
_YOUNGER_S = 30 * 86_400.0
# What a model or a tokenizer is made of; a user's folder may hold other files too.
_SMALL = (".json", ".jinja", ".txt", ".model")
_WEIGHTS = ".safetensors"
_MOST_KNOWN = 2000


class FileHashes:
    """sha256 of files, remembered by path, size and time of change in the file `memory`.

    For any thread; a file is read once even if several ask at the same time.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._known: dict[str, list[object]] = _read(memory) if memory else {}

    def file(self, path: Path, sha256: str | None = None) -> File:
        """The file as it is now; its hash is read, remembered, or given. OSError passes."""
        with self._lock:
            found = path.stat()
            if sha256 is not None:
                return File(path, found.st_size, sha256)
            key, state = str(path.resolve()), [found.st_size, found.st_mtime_ns]
            known = self._known.get(key, [])
            if known[:2] != state or len(known) != 3:
                known = [*state, file_hash(path)]
                self._known.pop(key, None)
                self._known[key] = known
                self._keep()
            return File(path, found.st_size, str(known[2]))

    def _keep(self) -> None:
        """On the disk, if that is possible; else it is read again next time."""
        if self._memory is None:
            return
        newest = dict(list(self._known.items())[-_MOST_KNOWN:])
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._memory, json.dumps(newest).encode())
        except OSError:
            return


def file_bundle(path: Path, hashes: FileHashes, sha256: str | None = None) -> Bundle:
    """One file, under the hash of its bytes."""
    file = hashes.file(path, sha256)
    return Bundle(file.sha256, {path.name: file})


def folder_bundle(folder: Path, hashes: FileHashes, *, weights: bool = True) -> Bundle:
    """What makes a model or a tokenizer of a folder, under the hash of names and bytes."""
    suffixes = (*_SMALL, _WEIGHTS) if weights else _SMALL
    files = {
        path.name: hashes.file(path)
        for path in sorted(folder.iterdir())
        if path.name.endswith(suffixes) and not path.name.startswith(".") and path.is_file()
    }
    text = "".join(f"{name}\n{file.sha256}\n" for name, file in sorted(files.items()))
    return Bundle(hashlib.sha256(text.encode()).hexdigest(), files)


def deliver_files(
    machine: Machine, bundles: list[Bundle], transfer: TransferProgress, run: str | None
) -> str:
    """Have bundles on the host, each in a folder named by its key; returns the folder of these.
    `run` is the run's folder there, which keeps them from being pruned."""
    root = f"{machine.workdir}/files"
    deliver_bundles(machine, root, bundles, transfer, run=run, keep=0, younger_s=_YOUNGER_S)
    return root


class PreparedFiles:
    """The files of prepared data: looked at once on the driver, then brought to each host."""

    def __init__(self, prepared: Prepared, hashes: FileHashes, *, weights: bool = True) -> None:
        """Reads what was not hashed before. Without `weights` a model is only its description."""
        self._prepared = prepared
        self._data = file_bundle(Path(prepared.path), hashes, prepared.sha256)
        self._folders = {
            folder: folder_bundle(
                Path(folder), hashes, weights=weights and folder == prepared.model_folder
            )
            for folder in (prepared.tokenizer, prepared.model_folder)
            if folder is not None
        }

    def deliver(
        self, machine: Machine, transfer: TransferProgress, run: str | None = None
    ) -> Prepared:
        """Have them on the host; the same prepared data with the host's paths.

        `run` is the run's folder there, which keeps them from being pruned.
        """
        bundles = {bundle.key: bundle for bundle in (self._data, *self._folders.values())}
        root = deliver_files(machine, [*bundles.values()], transfer, run)
        places = {folder: f"{root}/{bundle.key}" for folder, bundle in self._folders.items()}
        return msgspec.structs.replace(
            self._prepared,
            path=f"{root}/{self._data.key}/{next(iter(self._data.files))}",
            tokenizer=places.get(self._prepared.tokenizer or ""),
            model_folder=places.get(self._prepared.model_folder or ""),
        )


def _read(memory: Path) -> dict[str, list[object]]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(found, dict) and all(isinstance(line, list) for line in found.values())
    return found if is_ours else {}
