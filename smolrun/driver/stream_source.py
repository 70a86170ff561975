"""A run whose data is a stream: the driver's reader, and what each rank is fed with.

Only wiring; the reader is in data/stream.py, the way to the ranks in
launch/streams.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from smolrun.config import RunConfig
from smolrun.data.cache import cache_folder
from smolrun.targets import load_target

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared, Progress
    from smolrun.data.stream import StreamReader
    from smolrun.driver.resume import Earlier


def open_reader(
    config: RunConfig,
    prepared: Prepared,
    progress: Progress,
    *,
    updates: int = 0,
    driver_state: Mapping[str, Any] | None = None,
) -> StreamReader | None:
    """The reader of the stream, at the first row after `updates` updates; None where the data is
    no stream. `driver_state` is what `reader_state` gave, in the checkpoint that the run goes on
    from. DataError if the stream cannot be read that far."""
    if prepared.stream is None:
        return None
    cache = cache_folder("data")
    data = load_target(config.data.target)(cache, **config.data.keywords())
    reader: StreamReader = data.stream(
        prepared,
        seed=config.seed,
        row=updates * config.training.global_batch_size,
        bookmark=(driver_state or {}).get("stream"),
    )
    reader.catch_up(progress)
    return reader


def reader_of(
    config: RunConfig, prepared: Prepared, earlier: Earlier | None, progress: Progress
) -> StreamReader | None:
    """The reader of the stream, where the data is one, and where the run goes on."""
    if earlier is None:
        return open_reader(config, prepared, progress)
    done, state = earlier.updates, earlier.driver_state
    return open_reader(config, prepared, progress, updates=done, driver_state=state)


def reader_state(config: RunConfig, reader: StreamReader | None, updates: int) -> dict[str, Any]:
    """What the driver must remember after so many updates, to find its place again."""
    if reader is None:
        return {}
    return {"stream": reader.bookmark_for(updates * config.training.global_batch_size)}
