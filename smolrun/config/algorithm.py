"""The facts of an algorithm that the driver, the plan and the dry run ask for. What each algorithm
has of its own is in algorithms.py and partial_models.py."""

from __future__ import annotations

from typing import ClassVar

from smolrun.config.base import TargetConfig
from smolrun.config.sharding import RankSizes, Sharding, StagesConfig


class AlgorithmConfig(TargetConfig):
    """The facts of an algorithm. The defaults are those of a synchronous data-parallel one, and of
    the user's own.

    A method `check_*` yields problem lines; its keyword parameters are the groups it reads, and
    `world_size`. It runs if all of these are valid by themselves.
    """

    max_ranks: ClassVar[int | None] = None
    is_asynchronous: ClassVar[bool] = False  # workers never wait for each other
    places_experts: ClassVar[bool] = False  # a rank has some of the experts of a model
    has_server: ClassVar[bool] = False  # rank 0 holds the parameters for all
    quantizes_gradients: ClassVar[bool] = False  # it obeys the group `quantization`

    @property
    def is_lockstep(self) -> bool:
        """Whether every step waits for its slowest rank, so that all ranks are at the same one."""
        return not self.is_asynchronous

    @property
    def has_dedicated_server(self) -> bool:
        """Whether rank 0, if there are others, computes no samples."""
        return False

    @property
    def min_ranks_left(self) -> int | None:
        """Ranks, rank 0 included, with which an elastic run continues; None: it needs them all."""
        return None

    @property
    def can_delay_gradients(self) -> bool:
        """Whether `staleness.bound` > 0 hides communication behind computation."""
        return not self.is_asynchronous

    @property
    def why_no_replicas(self) -> str:
        """Why no two ranks hold equal parameters; empty where they do."""
        return ""

    def pending_gradients(self, bound: int) -> int:
        """Gradients of earlier steps that a rank keeps beside its newest, by the staleness."""
        return bound

    def batch_parts(self, workers: int) -> int | None:
        """Equal parts that a global batch is cut into; None: shares in proportion to speed."""
        return None

    def stage_advice(self, world_size: int, global_batch_size: int) -> str | None:
        """What lets stages of a model wait less for each other; None where ranks hold no stages."""
        return None

    def with_stage(self, stage: int) -> AlgorithmConfig | None:
        """The same algorithm with another sharding stage; None where it has no stages."""
        return None

    def stages(self, world_size: int) -> StagesConfig | None:
        """How a model is cut into stages of layers, one a rank; None where ranks hold no stages."""
        return None

    def lighter(self) -> dict[str, AlgorithmConfig]:
        """The same algorithm with a key of its own that may save memory, as it would be typed."""
        return {}

    def sharding(self, sizes: RankSizes) -> Sharding:
        """What a rank holds of the model, and sends."""
        return Sharding()
