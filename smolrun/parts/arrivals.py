"""Parameters that are still on their way when the next step begins: waited for when they are used.

    rank 0   update ][ forward: layer 0 | layer 1 | layer 2 ...
    network         [ gather 0 ][ gather 1 ][ gather 2 ]

A bucket is waited for when somebody looks at one of its parameters, whoever that is. So the network
works while forward does, and nobody ever sees an old value. Knows nothing of what is gathered, or
why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from smolrun.mesh.mesh import Work
from smolrun.parts.flat_shards import Gathering, ShardedBucket
from smolrun.parts.unshard_on_access import watch


class Arrivals:
    """Buckets on their way; `wait` waits for a work, and counts the time."""

    def __init__(self, wait: Callable[[Work], None]) -> None:
        self._wait = wait
        self._bucket_of: dict[nn.Parameter, ShardedBucket] = {}
        self._arriving: dict[ShardedBucket, Gathering] = {}

    def watch(self, model: nn.Module, buckets: Sequence[ShardedBucket]) -> None:
        """From now on whoever looks at a parameter of `model` waits for it."""
        self._bucket_of = {p: bucket for bucket in buckets for p in bucket.parameters}
        watch(model, self._use)

    def add(self, bucket: ShardedBucket, gathering: Gathering) -> None:
        """It has set out."""
        self._arriving[bucket] = gathering

    def land(self) -> None:
        """Waits for all."""
        for bucket in list(self._arriving):
            self._land(bucket)

    def _use(self, parameter: nn.Parameter) -> None:
        bucket = self._bucket_of.get(parameter)
        if bucket in self._arriving:
            self._land(bucket)

    def _land(self, bucket: ShardedBucket) -> None:
        gathering = self._arriving.pop(bucket)
        self._wait(gathering.work)
        gathering.land()
