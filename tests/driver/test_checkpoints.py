"""What comes from other hosts: it is waited for at the end, as long as the user wants to wait."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from smolrun.cli.compose import compose
from smolrun.driver.checkpoints import RunCheckpoints
from smolrun.driver.fleet import Fleet
from smolrun.events import Event, Note, ShardFailed, ShardSaved
from smolrun.launch.control import Saving
from smolrun.launch.driver import Driver
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.tracking.run_folder import RunFolder


class Slow:
    """A fetcher with one shard on its way; waiting for it is interrupted by the user."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def take(self, event: Event) -> bool:
        return isinstance(event, ShardSaved)

    def arrived(self) -> list[Event]:
        return []

    def finish(self, timeout_s: float) -> list[Event]:
        self.waits.append(timeout_s)
        if timeout_s > 0:
            raise KeyboardInterrupt
        return [ShardFailed(10, 0, "not fetched in time")]


class Elsewhere:
    """A fleet with another host."""

    def __init__(self, fetcher: Slow) -> None:
        self._fetcher = fetcher

    def fetcher(self, checkpoints: Path, saving: Saving | None) -> Slow:
        assert saving is not None
        return self._fetcher


def test_ctrl_c_ends_the_wait_for_the_last_checkpoint(tmp_path: Path) -> None:
    slow, said, events = Slow(), list[str](), list[Event]()
    checkpoints = RunCheckpoints(
        compose(["checkpoint.every=10", "cluster.ranks=1"]),
        RunFolder(tmp_path),
        cast(Fleet, Elsewhere(slow)),
        resume=None,
        weights=None,
        driver_state=lambda updates: {},
        emit=events.append,
        say=said.append,
    )
    checkpoints.on_start(cast(Driver, None))
    checkpoints.on_event(ShardSaved(10, 0, {}, {}, 0.0, 0.1))
    checkpoints.on_end()
    assert len(slow.waits) == 2 and slow.waits[1] == 0
    assert said[0].startswith("fetching the last") and said[1].startswith("fetching stopped")
    (note,) = events
    assert isinstance(note, Note) and "rank 0: not fetched in time" in note.message
    assert checkpoints.checked(RunOutcome("done", 0)).status == "failed"
