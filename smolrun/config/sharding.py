"""What a rank holds and moves where ranks are not all alike, or share one replica: arithmetic.

The formulas, with what was measured beside them: docs/algorithms/.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankSizes:
    """A rank and its model. `share` is this rank's part of what is sharded; the largest parameter
    and the largest layer are in elements of `item_bytes` each."""

    rank: int
    world_size: int
    share: float
    item_bytes: int
    largest_parameter: int
    largest_layer: int


@dataclass(frozen=True)
class StagesConfig:
    """Ranks hold stages of layers, `count` of them; `replicas` pipelines follow each other in the
    order of ranks. `layers` are the keys; `schedule` None: one micro-batch after the other goes
    through all stages and back. A step has `micro_batches` at least, where there are as many
    samples."""

    layers: list[list[int]] | None
    count: int
    replicas: int = 1
    schedule: str | None = None
    micro_batches: int = 1


@dataclass(frozen=True)
class Sharding:
    """Stage 0 cuts nothing, 1 the optimizer, 2 gradients too, 3 parameters too. A worker with a
    parameter server is stage 1 with a share of nothing."""

    stage: int = 0
    share: float = 1.0  # of this rank
    bucket: int = 0  # numbers in the largest bucket
    live_buckets: int = 0
    layers: int = 0  # numbers in all layers that are whole at one time
    links: int = 0  # ranks that whole gradients and weights go to and come from: server or workers
    push_buffers: int = 0  # of a parameter server or its workers: gradients or weights in flight
    averages: int = 0  # of the weights

    def of(self, stage: int) -> float:
        """This rank's part of what is cut from `stage` on."""
        return self.share if self.stage >= stage else 1.0

    def passing(self, size: int, used: int) -> int:
        """Bytes that are there for a moment: whole buckets, and at stage 3 whole layers. A number
        of a bucket has `size` bytes, one that is computed with `used`."""
        buckets = size * self.live_buckets * self.bucket if self.stage >= 2 else 0
        return buckets + (used * self.layers if self.stage == 3 else 0)

    def moved(self, size: int, used: int, gradient: float, micro_batches: int) -> float:
        """Bytes per parameter and step that travel, in units of (N - 1) / N: an all_reduce is two
        of them, a reduce_scatter or an all_gather one. A gradient travels in `gradient` bytes."""
        if self.stage == 0:
            return 2 * gradient
        if self.stage < 3:
            return (micro_batches if self.stage == 2 else 1) * gradient + size
        return micro_batches * gradient + self.gathered(used, micro_batches)

    def gathered(self, used: int, micro_batches: int) -> float:
        """Of these, bytes of weights that are gathered for forward and for backward, at stage 3."""
        return 2 * used * micro_batches if self.stage == 3 else 0


NOT_CUT = Sharding()
