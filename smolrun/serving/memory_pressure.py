"""Whether the hosts of a server have memory for another request. Pure.

On a CPU a slot of the cache takes its memory as tokens come, so beside what must stay free a host
needs room for the slots that the running requests, and the new one, may still fill. Low is left
later than it is entered: a host at the limit would else change with every page.
"""

from __future__ import annotations

from collections.abc import Sequence

from smolrun.serving.messages import HostMemory, StageStats

_SHARE = 0.05  # of a host's memory stays free for others: systems swap before all is used
_LEAST_BYTES = 2**29
_LEFT_FACTOR = 1.5
_GB = 2**30


class MemoryPressure:
    """The memory of the hosts of one engine, as last reported since its model was loaded."""

    def __init__(
        self,
        min_free_gb: float | None = None,
        stages: Sequence[StageStats] = (),
        slots: int = 1,
    ) -> None:
        """`min_free_gb`: what must stay available on every host, 0 for no limit; None: 5 % of its
        memory, and 0.5 GB at least. Every stage keeps `slots` sequences."""
        self._min_free_gb = min_free_gb
        self._reports: dict[int, HostMemory] = {}
        self._begin_bytes: dict[int, int] = {}  # of a process whose cache is empty
        self._stages = {stage.rank: stage for stage in stages}
        self._slots = max(1, slots)
        self._low: set[int] = set()

    def note(self, report: HostMemory) -> None:
        """A report of a rank, the first of which comes before any request."""
        self._reports[report.rank] = report
        self._begin_bytes.setdefault(report.rank, report.process_bytes)

    def reason(self, running: int) -> str | None:
        """Why no request can be taken beside `running` ones, as a sentence; None where there is
        room on every host."""
        for rank, report in self._reports.items():
            reserve = self._reserve(report)
            here = [one for one, other in self._reports.items() if other.host == report.host]
            growth = sum(self._growth(one, running + 1) for one in here)
            left = report.available_bytes - growth
            is_low = left < reserve * (_LEFT_FACTOR if rank in self._low else 1.0)
            (self._low.add if is_low else self._low.discard)(rank)
        if not self._low:
            return None
        report = self._reports[min(self._low)]
        available, reserve = report.available_bytes / _GB, self._reserve(report) / _GB
        return (
            f"{report.host} has {available:.1f} GB of memory available, and {reserve:.1f} GB must "
            "stay free beside the answers; try again later"
        )

    def _reserve(self, report: HostMemory) -> float:
        if self._min_free_gb is not None:
            return self._min_free_gb * _GB
        return max(_LEAST_BYTES, _SHARE * report.total_bytes)

    def _growth(self, rank: int, sequences: int) -> float:
        """Bytes that so many sequences may still take of a rank's host."""
        stage = self._stages.get(rank)
        report = self._reports[rank]
        if stage is None or not report.cache_grows:
            return 0.0
        filled = max(0, report.process_bytes - self._begin_bytes[rank])
        slots = min(sequences, self._slots) * stage.cache_bytes / self._slots
        return max(0.0, min(slots, stage.cache_bytes - filled))
