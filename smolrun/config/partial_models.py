"""Group `algorithm`, where ranks hold parts of a model: stages of its layers, or some of its
experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from smolrun.config.algorithm import AlgorithmConfig
from smolrun.config.base import Auto, Count, Positive
from smolrun.config.models import CustomModelConfig, DecoderConfig, MlpConfig, ModelConfig
from smolrun.config.settings import TrainingConfig
from smolrun.config.sharding import StagesConfig
from smolrun.config.suggest import problem

_MICRO_BATCHES_PER_STAGE = 4  # as in algorithms/mp_pipeline.py


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
