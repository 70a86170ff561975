"""What comes from other hosts: it is waited for at the end, as long as the user wants to wait."""

from __future__ import annotations

from typing import cast

from smolrun.checkpoints.committer import CheckpointCommitter
from smolrun.driver.checkpoints import Fetched
from smolrun.events import Event, ShardFailed, ShardSaved
from smolrun.launch.delivery.shards import ShardFetcher


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
        return [ShardFailed(10, 1, "not fetched in time")]


class Kept:
    """What the committer hears."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def record(self, event: Event) -> bool:
        self.heard.append(event)
        return True


def test_ctrl_c_ends_the_wait_for_the_last_checkpoint() -> None:
    slow, kept = Slow(), Kept()
    said: list[str] = []
    fetched = Fetched(cast(ShardFetcher, slow), cast(CheckpointCommitter, kept))
    assert fetched.take(ShardSaved(10, 1, {}, {}, 0.0, 0.1))
    fetched.finish(said.append)
    assert len(slow.waits) == 2 and slow.waits[1] == 0
    assert kept.heard == [ShardFailed(10, 1, "not fetched in time")]
    assert said[0].startswith("fetching") and said[1].startswith("not waiting")
