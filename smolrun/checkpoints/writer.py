"""Writing one rank's part of a checkpoint: safetensors files, durable and hashed.

    training   step | step | copy | step | step | copy | ...
    saver                         [ write, hash, report ]      at most one at a time

A rank writes and reports; the driver merges the reports and commits (committer.py). Training pauses
only while tensors are copied and while an earlier write is not done. One thread, "smolrun-saver". A
write that fails is reported; the run continues and the next save tries again. Knows no manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from smolrun.checkpoints.folder import part_folder
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.errors import CheckpointError
from smolrun.events import ShardFailed, ShardSaved, StateOf

# Hashed and written in turns, so that the bytes are still in the processor's cache.
_CHUNK_BYTES = 4 << 20


def write_shard(
    folder: Path, rank: int, pieces: Iterable[TensorSlice], max_file_bytes: int = 1 << 30
) -> dict[str, Any]:
    """Write a rank's slices into files of at most `max_file_bytes` below `folder`; returns the
    report for `merge`, JSON.

    The folder is made if needed. Blocks until everything is on the disk. `pieces` is iterated once,
    and no more than one file's tensors are held, so it may be a generator. If writing fails
    (disk full, read-only: OSError), the files of this call are removed first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard = _Shard(folder, rank)
    try:
        batch: list[TensorSlice] = []
        size = 0
        for piece in _cut(pieces, max_file_bytes):
            if batch and size + piece.num_bytes > max_file_bytes:
                shard.write(batch)
                batch, size = [], 0
            batch.append(piece)
            size += piece.num_bytes
        if batch:
            shard.write(batch)
    except BaseException:
        shard.remove()
        raise
    return {"rank": rank, "files": shard.files, "tensors": shard.tensors}


def partition_keys(slices: Iterable[TensorSlice], size: int, index: int) -> list[TensorSlice]:
    """What rank `index` of `size` writes of the `slices` that it holds: those only it has,
    and a part of the keys that all have, which are given out by size, the largest first, each to
    the rank with the fewest bytes."""
    held = list(slices)
    replicated = {part.key: part.num_bytes for part in held if part.writer == "any"}
    loads, own = [0] * size, set()
    for key in sorted(replicated, key=lambda key: (-replicated[key], key)):
        owner = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owner] += replicated[key]
        if owner == index:
            own.add(key)
    return [part for part in held if part.writer == "this" or part.key in own]


def _cut(pieces: Iterable[TensorSlice], max_bytes: int) -> Iterator[TensorSlice]:
    """The slices, those too large for a file split; views, nothing is copied."""
    for piece in pieces:
        most = max(1, max_bytes // piece.values.element_size())
        if piece.values.numel() <= most:
            yield piece
            continue
        start = piece.start
        for values in piece.values.detach().reshape(-1).split(most):
            yield TensorSlice(piece.key, piece.shape, start, values)
            start += values.numel()


class _Shard:
    """The files one call has written so far."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._begun: list[Path] = []
        self.files: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, dict[str, Any]] = {}

    def write(self, batch: list[TensorSlice]) -> None:
        """Write one file. Empty slices are reported, not written."""
        name = f"rank{self._rank}-{len(self.files)}.safetensors"
        for piece in batch:
            self._report(name, piece)
        filled = [piece for piece in batch if piece.num_bytes]
        if not filled:
            return
        path = self._folder / name
        # "x": never replaces a file of another writer.
        with open(path, "xb") as file:
            self._begun.append(path)
            digest = hashlib.sha256()
            for chunk in _safetensors(filled):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        self.files[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def _report(self, file: str, piece: TensorSlice) -> None:
        new = {"dtype": piece.dtype_name, "shape": list(piece.shape), "pieces": []}
        entry = self.tensors.setdefault(piece.key, new)
        if (entry["dtype"], entry["shape"]) != (new["dtype"], new["shape"]):
            raise CheckpointError(f"{piece.key}: two slices differ in dtype or shape")
        if any(other["start"] == piece.start for other in entry["pieces"]):
            raise CheckpointError(f"{piece.key}: element {piece.start} was given twice")
        if piece.num_bytes:
            entry["pieces"].append(
                {"file": file, "name": _name(piece), "start": piece.start, "stop": piece.stop}
            )

    def remove(self) -> None:
        """Remove everything this call wrote, ignoring errors."""
        for path in self._begun:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                pass


def _name(piece: TensorSlice) -> str:
    """In a file: readable, and never a name that safetensors keeps for itself."""
    return f"{piece.key}@{piece.start}"


def _safetensors(pieces: list[TensorSlice]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file.

    Written here, not by safetensors' save_file, for three reasons: the hash is made on the way
    and nothing is read back; tensors that share memory (tied weights) may be saved; and a full
    disk is an OSError. Source: https://huggingface.co/docs/safetensors (Format).
    """
    header: dict[str, Any] = {}
    offset = 0
    for piece in pieces:
        stop = offset + piece.num_bytes
        header[_name(piece)] = {
            "dtype": piece.dtype_name,
            "shape": [piece.values.numel()],
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        # One tensor at a time comes from its device.
        flat = piece.values.detach().to("cpu").reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]


class Saver:
    """Saves the slices of one rank in the background. `emit` is called from the saver's thread."""

    def __init__(
        self,
        folder: Path,
        token: str,
        rank: int,
        emit: Callable[[ShardSaved | ShardFailed], None],
    ) -> None:
        """`folder` is the run's folder of checkpoints; `token` is the same on all ranks."""
        self._folder = folder
        self._token = token
        self._rank = rank
        self._emit = emit
        self._writing: threading.Thread | None = None

    def save(
        self, updates: int, pieces: Iterable[TensorSlice], state: Mapping[StateOf, dict[str, Any]]
    ) -> None:
        """Copy the slices and start to write them; blocks for an earlier write and the copies."""
        started = time.perf_counter()
        self.finish()
        copies = [
            dataclasses.replace(piece, values=piece.values.detach().to("cpu", copy=True))
            for piece in pieces
        ]
        waited_s = time.perf_counter() - started
        self._writing = threading.Thread(
            target=self._write,
            args=(updates, copies, state, waited_s),
            name="smolrun-saver",
            daemon=True,
        )
        self._writing.start()

    def finish(self) -> None:
        """Block until the current write has ended. No deadline: it ends when the disk does."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write(
        self,
        updates: int,
        pieces: list[TensorSlice],
        state: Mapping[StateOf, dict[str, Any]],
        waited_s: float,
    ) -> None:
        started = time.perf_counter()
        try:
            part = part_folder(self._folder, updates, self._token)
            report = write_shard(part, self._rank, pieces)
        except Exception as error:  # no error of a save ends training
            reason = error.strerror if isinstance(error, OSError) else None
            self._emit(ShardFailed(updates, self._rank, f"{reason or error} ({self._folder})"))
            return
        write_s = time.perf_counter() - started
        self._emit(ShardSaved(updates, self._rank, report, state, waited_s, write_s))
