"""Group `algorithm`: how the ranks share the work.

What an algorithm is stands in its class here and nowhere else: its keys, its rules about other
groups (methods `check_*`), and the facts that the driver, the plan and the dry run ask for. A new
algorithm is a file of smolrun/algorithms/, a file of conf/algorithm/ and a class of this file, or
of partial_models.py where ranks hold parts of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from smolrun.config.algorithm import AlgorithmConfig
from smolrun.config.base import (
    Auto,
    Count,
    CustomTargetConfig,
    NotNegative,
    Positive,
    chosen_by_target,
)
from smolrun.config.cluster import ClusterConfig
from smolrun.config.data import DataConfig
from smolrun.config.optimizers import Optimizer
from smolrun.config.partial_models import EPConfig, ModelParallelConfig, PipelineConfig
from smolrun.config.settings import StalenessConfig, TrainingConfig
from smolrun.config.sharding import RankSizes, Sharding
from smolrun.config.suggest import problem


class SingleConfig(AlgorithmConfig):
    """One rank that holds everything: the reference that all others must equal."""

    max_ranks: ClassVar[int | None] = 1
    target: Literal["smolrun.algorithms.single:Single"]

    @property
    def why_no_replicas(self) -> str:
        return "algorithm=single has one copy of the model"


class ClassicDPConfig(AlgorithmConfig):
    """A replica on every rank; a ring all_reduce averages gradients while backward still runs."""

    quantizes_gradients: ClassVar[bool] = True
    target: Literal["smolrun.algorithms.classicdp:classicdp"]
    bucket_mb: Positive
    shard_optimizer: Auto | bool

    def check_optimizer(self, *, optimizer: Optimizer) -> Iterator[str]:
        """Shards end in the middle of matrices."""
        if self.shard_optimizer is True and optimizer.name == "adafactor":
            yield problem(
                "algorithm.shard_optimizer",
                True,
                "shards matrices, and optimizer=adafactor needs whole ones",
                allowed="auto or false, where training.resync_every keeps replicas equal; or "
                "optimizer=adamw, lion, sgd",
            )

    def sharding(self, sizes: RankSizes) -> Sharding:
        return Sharding(1, sizes.share) if self.shard_optimizer is True else Sharding()


class FSDPConfig(AlgorithmConfig):
    """As classicdp, but optimizer, gradients and parameters are sharded across the ranks."""

    quantizes_gradients: ClassVar[bool] = True
    target: Literal["smolrun.algorithms.fsdp:fsdp"]
    stage: Literal[0, 1, 2, 3]
    bucket_mb: Positive
    max_live_buckets: Count
    prefetch: Annotated[int, Field(ge=0)]

    @property
    def can_delay_gradients(self) -> bool:
        return self.stage < 3

    @property
    def why_no_replicas(self) -> str:
        return "fsdp stage 3 has every parameter on one rank only" if self.stage == 3 else ""

    def check_staleness(self, *, staleness: StalenessConfig) -> Iterator[str]:
        """Weights that are gathered for each use have no older version for an older gradient."""
        if self.stage == 3 and staleness.bound not in ("auto", 0):
            yield problem(
                "staleness.bound",
                staleness.bound,
                "fsdp stage 3 gathers weights anew in every step, so a stale gradient would belong "
                "to others",
                allowed="0, or algorithm.stage=0, 1, 2",
            )

    def check_optimizer(self, *, optimizer: Optimizer) -> Iterator[str]:
        """Shards end in the middle of matrices."""
        if self.stage and optimizer.name == "adafactor":
            yield problem(
                "optimizer",
                optimizer.name,
                f"needs whole matrices, which fsdp stage {self.stage} shards",
                allowed="adamw, lion, sgd, or algorithm.stage=0",
            )

    def with_stage(self, stage: int) -> AlgorithmConfig | None:
        return self.model_copy(update={"stage": stage})

    def sharding(self, sizes: RankSizes) -> Sharding:
        bucket = int(self.bucket_mb * 2**20) // sizes.item_bytes
        return Sharding(
            self.stage,
            sizes.share,
            max(bucket, sizes.largest_parameter),
            self.max_live_buckets,
            layers=(1 + self.prefetch) * max(bucket, sizes.largest_layer),
        )


class _ParameterServerConfig(AlgorithmConfig):
    """Keys and facts of algorithms where rank 0 holds the parameters and the optimizer."""

    has_server: ClassVar[bool] = True
    quantizes_gradients: ClassVar[bool] = True
    server_trains: bool

    @property
    def has_dedicated_server(self) -> bool:
        return not self.server_trains


class SyncPSConfig(_ParameterServerConfig):
    """A synchronous parameter server: workers push gradients to rank 0 and pull new weights."""

    target: Literal["smolrun.algorithms.syncps:syncps"]
    straggler_timeout_s: NotNegative
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    pull_weights: Literal["newest", "average"]
    bucket_mb: Positive

    @property
    def is_lockstep(self) -> bool:
        return self.straggler_timeout_s == 0

    @property
    def can_delay_gradients(self) -> bool:
        return self.is_lockstep

    def check_workers(self, *, world_size: int) -> Iterator[str]:
        """A dedicated server needs a worker."""
        if not self.server_trains and world_size == 1:
            what = "the server is the only rank"
            allowed = "true, or more cluster.ranks"
            yield problem("algorithm.server_trains", False, what, allowed=allowed)

    def check_stragglers(
        self,
        *,
        staleness: StalenessConfig,
        training: TrainingConfig,
        data: DataConfig,
        cluster: ClusterConfig,
    ) -> Iterator[str]:
        """A straggler skips steps, so nothing may need every rank at every step."""
        if not self.straggler_timeout_s:
            return
        speeds = {host.speed for host in cluster.hosts or []}
        for is_wrong, what, allowed in (
            (
                staleness.bound not in ("auto", 0),
                "with staleness.bound gradients are delayed on purpose, and none may be dropped",
                "0, or staleness.bound=0",
            ),
            (
                training.check_replicas,
                "a straggler has older weights than the others",
                "0, or training.check_replicas=false",
            ),
            (
                training.resync_every not in ("auto", 0),
                "a resync needs all ranks at one step, and a straggler skips steps",
                "0, or training.resync_every=0",
            ),
            (
                data.is_stream,
                "a straggler skips steps, and a stream cannot",
                "0, or data that is no stream",
            ),
            (
                "auto" in speeds,
                "a straggler does not receive the measured speeds of the others",
                "0, or a number for every cluster.hosts speed",
            ),
        ):
            if is_wrong:
                yield problem(
                    "algorithm.straggler_timeout_s", self.straggler_timeout_s, what, allowed=allowed
                )

    def check_average(self, *, precision: str) -> Iterator[str]:
        """An average that exists, in a type that can hold it."""
        if self.pull_weights == "average" and not self.ema_decay:
            what = "algorithm.ema_decay=0.0 keeps no average"
            allowed = "newest, or algorithm.ema_decay=0.99"
            yield problem("algorithm.pull_weights", "average", what, allowed=allowed)
        if self.ema_decay and precision == "bf16_params":
            what = "an average of small changes needs more digits than bfloat16 has"
            allowed = "0.0, or another precision"
            yield problem("algorithm.ema_decay", self.ema_decay, what, allowed=allowed)

    def sharding(self, sizes: RankSizes) -> Sharding:
        workers = sizes.world_size - 1
        if sizes.rank == 0:
            return Sharding(links=workers, push_buffers=workers, averages=int(self.ema_decay > 0))
        return Sharding(stage=1, share=0.0, links=1)


class EDPConfig(_ParameterServerConfig):
    """An asynchronous parameter server: workers never wait for each other, and may join, leave
    and rejoin."""

    is_asynchronous: ClassVar[bool] = True
    target: Literal["smolrun.algorithms.edp:edp"]
    pushes_per_batch: Auto | Count
    staleness_lr_scale: Literal["none", "inverse", "inverse_sqrt"]
    wait_fraction: NotNegative
    min_ranks: Count

    @property
    def min_ranks_left(self) -> int | None:
        return self.min_ranks

    @property
    def why_no_replicas(self) -> str:
        return "the ranks of edp have weights of different age, so no two need be equal"

    def pending_gradients(self, bound: int) -> int:
        return 0  # the bound limits how far a worker may lag; what it pushed, it does not keep

    def batch_parts(self, workers: int) -> int | None:
        return workers if self.pushes_per_batch == "auto" else self.pushes_per_batch

    def check_replicas(self, *, training: TrainingConfig) -> Iterator[str]:
        """Replicas of different versions cannot be compared."""
        if training.check_replicas:
            yield problem("training.check_replicas", True, self.why_no_replicas, allowed="false")

    def check_work_items(self, *, training: TrainingConfig, data: DataConfig) -> Iterator[str]:
        """Which rank computes the next part of the data is decided during the run."""
        pushes = self.pushes_per_batch
        if data.is_stream:
            what = "rows of a stream are requested ahead, and edp assigns samples only when needed"
            yield problem("data.streaming", True, what, allowed="false, or algorithm=classicdp")
        if pushes != "auto" and pushes > training.global_batch_size:
            allowed = f"auto, or 1 to training.global_batch_size = {training.global_batch_size}"
            what = "parts without samples"
            yield problem("algorithm.pushes_per_batch", pushes, what, allowed=allowed)

    def check_min_ranks(self, *, cluster: ClusterConfig, world_size: int) -> Iterator[str]:
        """More ranks than the run has cannot be required; the shipped 2 is allowed for one rank."""
        most = max(world_size, 2)
        if self.min_ranks > most:
            size = "one rank" if world_size == 1 else f"{world_size} ranks"
            more = "ranks in cluster.hosts" if cluster.hosts is not None else "cluster.ranks"
            what, allowed = f"the run has only {size}", f"1 to {most}, or more {more}"
            yield problem("algorithm.min_ranks", self.min_ranks, what, allowed=allowed)

    def sharding(self, sizes: RankSizes) -> Sharding:
        workers = sizes.world_size - 1
        if sizes.rank == 0:  # for each worker: a push, and a copy of the weights
            return Sharding(links=workers, push_buffers=2 * workers)
        # Two pushes, and the weights that arrive.
        return Sharding(stage=1, share=0.0, links=1, push_buffers=3)


class CustomAlgorithmConfig(CustomTargetConfig, AlgorithmConfig, extra="allow"):
    """The user's own algorithm."""

    has_server: ClassVar[bool] = True  # it may have one


if TYPE_CHECKING:
    AnyAlgorithm = AlgorithmConfig
else:
    AnyAlgorithm = chosen_by_target(
        CustomAlgorithmConfig,
        SingleConfig,
        ClassicDPConfig,
        FSDPConfig,
        SyncPSConfig,
        EDPConfig,
        EPConfig,
        ModelParallelConfig,
        PipelineConfig,
    )
