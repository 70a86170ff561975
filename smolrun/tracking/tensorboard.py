"""`tracker=tensorboard`: the figures of a run as TensorBoard's event files, in `tensorboard/`.

Uses TensorBoard's own record writer, which needs neither torch nor TensorFlow.
"""

from __future__ import annotations

import time
from pathlib import Path

from smolrun.errors import ConfigError
from smolrun.events import Event, to_json
from smolrun.tracking.figures import figures

_FLUSH_EVERY_S = 2.0


class TensorBoard:
    """A tracker that writes one event file; a resumed run writes another one beside it."""

    def __init__(self, folder: Path) -> None:
        """ConfigError without the package; OSError if the file cannot be made."""
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            how = "pip install 'smolrun[tensorboard]'"
            raise ConfigError(f"tracker=tensorboard needs a package: {how} ({error})") from error
        self._event = event_pb2.Event
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = (folder / f"events.out.tfevents.{time.time_ns():020d}.smolrun").open("wb")
        self._writer = RecordWriter(self._file)
        self._flushed_at = time.monotonic()
        self._is_first = True
        self._add(file_version="brain.Event:2")

    def record(self, event: Event) -> None:
        """Write the numbers of the event, if it has a step."""
        row = to_json(event)
        step = row.get("step")
        numbers = figures(row)
        if not isinstance(step, int) or not numbers:
            return
        if self._is_first:
            self._is_first = False
            # A resumed run repeats some steps: from here on the older file's are void.
            self._add(step=step, session_log={"status": "START"})
        values = [{"tag": tag, "simple_value": value} for tag, value in numbers.items()]
        self._add(step=step, summary={"value": values})
        if time.monotonic() - self._flushed_at > _FLUSH_EVERY_S:
            self._flushed_at = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _add(self, **fields: object) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
