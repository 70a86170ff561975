"""Writes a rank's part of a checkpoint while training goes on.

    training   step | step | copy | step | step | copy | ...
    saver                         [ write, hash, report ]      at most one at a time

Training stands still only while the tensors are copied, and while an earlier write is not done. One
thread, "smolrun-saver". A write that fails is reported like one that does not: the run goes on, and
the next save tries again.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from smolrun.checkpoints.folder import part_folder
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard
from smolrun.events import ShardFailed, ShardSaved, StateOf


class Saver:
    """Saves for one rank. `emit` is called from the saver's thread."""

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
        """Copies the pieces and starts to write them; waits for an earlier write."""
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
        """Waits for the write that is going on. A disk ends it, well or not; a deadline would not
        help it."""
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
        except Exception as error:  # whatever it is, training goes on
            reason = error.strerror if isinstance(error, OSError) else None
            self._emit(ShardFailed(updates, self._rank, f"{reason or error} ({self._folder})"))
            return
        write_s = time.perf_counter() - started
        self._emit(ShardSaved(updates, self._rank, report, state, waited_s, write_s))
