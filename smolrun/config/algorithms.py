"""Group `algorithm`: how the ranks share the work.

What an algorithm is stands in its class here and nowhere else: its keys, its rules about other
groups (methods `check_*`), and the facts that the driver, the plan and the dry run ask for. A new
algorithm is a file of smolrun/algorithms/, a file of conf/algorithm/ and a class of this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from smolrun.config.base import (
    Auto,
    Count,
    CustomTargetConfig,
    NotNegative,
    Positive,
    TargetConfig,
    chosen_by_target,
)
from smolrun.config.cluster import ClusterConfig
from smolrun.config.data import DataConfig
from smolrun.config.models import CustomModelConfig, DecoderConfig, MlpConfig, ModelConfig
from smolrun.config.optimizers import Optimizer
from smolrun.config.settings import StalenessConfig, TrainingConfig
from smolrun.config.sharding import RankSizes, Sharding, StagesConfig
from smolrun.config.suggest import problem

_MICRO_BATCHES_PER_STAGE = 4  # as in algorithms/mp_pipeline.py


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


class ModelParallelConfig(AlgorithmConfig):
    """Every rank holds a stage of layers; a batch goes through all of them and back."""

    quantizes_gradients: ClassVar[bool] = True  # of hidden states, and hidden states themselves
    target: Literal["smolrun.algorithms.mp:ModelParallel"]
    layers: list[list[int]] | None

    @property
    def num_replicas(self) -> int:
        """Pipelines."""
        return 1

    @property
    def why_no_replicas(self) -> str:
        return f"algorithm={self.name} has every layer on one rank only"

    @property
    def can_delay_gradients(self) -> bool:
        return False  # a delay is allowed, but what travels is needed at once all the same

    def stage_advice(self, world_size: int, global_batch_size: int) -> str | None:
        return "try algorithm=mp_pipeline"

    def check_model(self, *, model: ModelConfig, world_size: int) -> Iterator[str]:
        """Only a decoder is cut, and every rank gets a layer."""
        if isinstance(model, MlpConfig):
            what = f"algorithm={self.name} cuts a model between the layers of a decoder"
            allowed = "model=gpt_tiny or another decoder, or algorithm=fsdp"
            yield problem("model", model.name, what, allowed=allowed)
        stages, replicas = world_size // self.num_replicas, self.num_replicas
        if isinstance(model, DecoderConfig) and stages > model.layers:
            what = f"too few for {world_size} ranks, of which each needs one"
            if replicas > 1:
                what = f"too few for {replicas} pipelines of {stages} ranks, each with a layer"
            allowed = f">= {stages}, or at most {model.layers * replicas} ranks"
            yield problem("model.layers", model.layers, what, allowed=allowed)

    def check_layers(self, *, model: ModelConfig, world_size: int) -> Iterator[str]:
        """Stages follow each other without gaps; how many layers only our own shapes say."""
        if self.layers is None:
            return
        count = world_size // self.num_replicas
        last = self.layers[-1][-1] if self.layers and self.layers[-1] else 0
        after = model.layers if isinstance(model, DecoderConfig) else last + 1
        ends = [-1, *(stage[-1] for stage in self.layers if stage)]
        is_whole = all(
            len(stage) == 2 and before + 1 == stage[0] <= stage[1]
            for before, stage in zip(ends, self.layers, strict=False)
        )
        if not is_whole or len(self.layers) != count or ends[-1] + 1 != after:
            whole = f"0 to {after - 1}" if isinstance(model, DecoderConfig) else "from 0 on"
            each = f"{world_size} ranks" if count == world_size else f"{count} stages"
            yield problem(
                "algorithm.layers",
                str(self.layers),
                "every layer belongs to one rank, and every rank has some, in the order of ranks",
                allowed=f"null, or [first, last] for each of {each}, layers {whole}",
            )

    def check_replicas(self, *, training: TrainingConfig) -> Iterator[str]:
        """One pipeline has none to compare."""
        if training.check_replicas and self.why_no_replicas:
            yield problem("training.check_replicas", True, self.why_no_replicas, allowed="false")

    def stages(self, world_size: int) -> StagesConfig | None:
        return StagesConfig(self.layers, world_size)

    def lighter(self) -> dict[str, AlgorithmConfig]:
        if self.layers is None:
            return {}
        return {"algorithm.layers=null": self.model_copy(update={"layers": None})}


class PipelineConfig(ModelParallelConfig):
    """As mp, with several micro-batches on their way through the stages."""

    target: Literal["smolrun.algorithms.mp_pipeline:mp_pipeline"]  # type: ignore[assignment]
    schedule: Literal["1f1b", "gpipe"]
    micro_batches: Auto | Count
    replicas: Count

    @property
    def num_replicas(self) -> int:
        return self.replicas

    @property
    def why_no_replicas(self) -> str:
        return "" if self.replicas > 1 else super().why_no_replicas

    def _count(self, world_size: int) -> int:
        if self.micro_batches == "auto":
            return _MICRO_BATCHES_PER_STAGE * (world_size // self.replicas)
        return self.micro_batches

    def stages(self, world_size: int) -> StagesConfig | None:
        return StagesConfig(
            self.layers,
            world_size // self.replicas,
            self.replicas,
            self.schedule,
            self._count(world_size),
        )

    def lighter(self) -> dict[str, AlgorithmConfig]:
        found = super().lighter()
        if self.schedule == "gpipe":
            found["algorithm.schedule=1f1b"] = self.model_copy(update={"schedule": "1f1b"})
        return found

    def stage_advice(self, world_size: int, global_batch_size: int) -> str | None:
        count = self._count(world_size)
        if 2 * count * self.replicas <= global_batch_size:
            return f"try algorithm.micro_batches={2 * count}"
        return f"try training.global_batch_size={2 * global_batch_size}"

    def check_micro_batches(self, *, training: TrainingConfig) -> Iterator[str]:
        """None is without samples."""
        count, batch = self.micro_batches, training.global_batch_size
        if count != "auto" and count > (most := batch // self.replicas):
            what = f"more than the samples of a step, training.global_batch_size = {batch}"
            what += f" for {self.replicas} pipelines" if self.replicas > 1 else ""
            yield problem("algorithm.micro_batches", count, what, allowed=f"auto or 1 to {most}")

    def check_pipelines(self, *, world_size: int) -> Iterator[str]:
        """All pipelines have as many stages."""
        if world_size % self.replicas:
            divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
            what = f"pipelines of equal length cannot be made of {world_size} ranks"
            allowed = ", ".join(map(str, divisors))
            yield problem("algorithm.replicas", self.replicas, what, allowed=allowed)


class EPConfig(AlgorithmConfig):
    """Every rank holds some of a model's experts and a replica of all else; tokens travel."""

    quantizes_gradients: ClassVar[bool] = True  # of the replicas
    places_experts: ClassVar[bool] = True
    target: Literal["smolrun.algorithms.ep:ep"]
    bucket_mb: Positive

    def check_model(self, *, model: ModelConfig, world_size: int) -> Iterator[str]:
        """It has experts, one for every rank at least."""
        moe = model.moe if isinstance(model, DecoderConfig) else None
        if moe is None and not isinstance(model, CustomModelConfig):
            allowed = "model=moe_tiny or moe_small, or algorithm=classicdp"
            yield problem("model", model.name, "has no experts to place", allowed=allowed)
        elif moe is not None and moe.experts < world_size:
            what = f"too few for {world_size} ranks, of which each needs one"
            allowed = f"{world_size} or more, or fewer ranks"
            yield problem("model.moe.experts", moe.experts, what, allowed=allowed)


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
