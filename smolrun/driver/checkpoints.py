"""What was saved on other hosts and has been brought here: handed on to the committer, who makes
checkpoints of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from smolrun.checkpoints.committer import CheckpointCommitter
from smolrun.events import Event

if TYPE_CHECKING:
    from smolrun.launch.delivery.shards import ShardFetcher

# The last checkpoint of a run over a slow link: as many bytes as a Wi-Fi of 5 MB/s brings of 3 GB.
_LAST_S = 600.0


class Fetched:
    """Between the ranks of other hosts and the committer; nothing to do without such hosts.
    All of it is for the driver's thread."""

    def __init__(self, fetcher: ShardFetcher | None, committer: CheckpointCommitter) -> None:
        self._fetcher = fetcher
        self._keeper = committer
        self._held = 0

    def take(self, event: Event) -> bool:
        """True if the event is for later: what it tells of is not here yet."""
        is_taken = self._fetcher is not None and self._fetcher.take(event)
        self._held += is_taken
        return is_taken

    def hand_on(self) -> None:
        """Tells the committer what has come since."""
        if self._fetcher is not None and self._held:
            self._tell(self._fetcher.arrived())

    def finish(self, say: Callable[[str], None]) -> None:
        """Waits for what is on its way, and ends the fetching."""
        if self._fetcher is None:
            return
        self.hand_on()
        if self._held:
            say("fetching the last checkpoint from the hosts")
        try:
            events = self._fetcher.finish(_LAST_S)
        except KeyboardInterrupt:  # the hosts are still to be left clean
            say("not waiting for it; what came after the last checkpoint here is lost")
            events = self._fetcher.finish(0.0)
        self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        self._held -= len(events)
        for event in events:
            self._keeper.record(event)
