"""Groups of plain settings.

How to train, with which optimizer, how often to look, what to measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from smolrun.config.base import Auto, Count, Name, Natural, NotNegative, Positive, Section, Share


class StalenessConfig(Section):
    """Group `staleness`: how stale a gradient may be when it is applied."""

    bound: Auto | Natural = Field(
        description="Steps a gradient may be stale: 0 = synchronous; auto = the algorithm's own"
    )


class QuantizationConfig(Section):
    """Group `quantization`: in which type gradients are sent."""

    kind: Literal["none", "int8", "fp16", "bf16"] = Field(
        description="none = unquantized; int8 = a quarter of float32's bytes; fp16, bf16 = half"
    )
    block: Annotated[int, Field(ge=8, le=65536)] = Field(
        description="int8: numbers that share one scale, which is 4 bytes"
    )
    error_feedback: bool = Field(
        description="Add the quantization error to the next gradient; 8 bytes of memory per "
        "parameter and rank"
    )


class TrainingConfig(Section):
    """Group `training`: the loop."""

    steps: Count = Field(description="Optimizer steps of the run")
    global_batch_size: Count = Field(
        description="Samples (sequences for text) per step, over all ranks together"
    )
    micro_batch_size: Auto | Count = Field(
        description="Samples one rank computes at once; auto = its whole share"
    )
    eval_every: Natural = Field(description="Steps between evaluations; 0 = only at the end")
    eval_batches: Count | None = Field(
        description="At most so many global batches per evaluation; null = all of them"
    )
    grad_clip: NotNegative = Field(
        description="Largest gradient norm over all parameters; 0 = no clipping"
    )
    warmup_steps: Natural = Field(
        description="Steps in which the learning rate rises; auto = a tenth of all, at most 100",
        json_schema_extra={"allowed": "auto or an integer >= 0"},
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        description="Learning rate after the warm-up"
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        description="Last learning rate / highest learning rate"
    )
    check_replicas: bool = Field(
        description="Compare a hash of all replicas after every step (slow; for tests)"
    )
    resync_every: Auto | Natural = Field(
        description="Updates between broadcasts of rank 0's replica, each with a report of the "
        "drift; 0 = never; auto = 100 where replicas may differ (unlike machines, and "
        "algorithm.shard_optimizer not at work), else 0"
    )
    sample_tokens: Natural = Field(description="Tokens of text to write at the end; 0 = none")
    sample_prompt: str = Field(
        description="Its prompt; auto = the beginning of the first evaluation sample"
    )
    recompute: bool = Field(
        description="Recompute activations of each block in backward instead of storing them; "
        "alias: gradient_checkpointing"
    )
    dry_run: bool = Field(description="Only report what the run would need")
    log_norms: Literal["none", "gradients", "all"] = Field(
        description="Norms layer by layer: of gradients, or also of parameters and updates (these "
        "need a copy of the model while they are taken)"
    )
    log_norms_every: Count = Field(description="Updates from one such measurement to the next")

    @model_validator(mode="before")
    @classmethod
    def _decide_warmup(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("warmup_steps") != "auto":
            return data
        steps = data.get("steps")
        tenth = steps // 10 if isinstance(steps, int | float) else 0  # 1e3 is a float
        return {**data, "warmup_steps": min(100, max(0, tenth))}


class CheckpointConfig(Section):
    """Group `checkpoint`: saving and resuming."""

    every: Natural = Field(
        description="Steps between two checkpoints; a last one is made at the end; 0 = none at all"
    )
    keep: Count = Field(description="How many of the newest to keep")
    keep_best: bool = Field(
        description="Keep the one with the lowest evaluation loss too, of those made right after "
        "an evaluation"
    )
    resume: Name | None = Field(
        description="latest, a run folder or a checkpoint folder; null = a new run. The run's "
        "own configuration is used; overrides apply on top"
    )
    trust_run_folder: bool = Field(
        description="Resume a run folder that was not written by this account on this machine; it "
        "can name code to run and machines to log in to"
    )


_TIMELINE = Field(description="Steps that timeline.json shows, from the sixth on; 0 = no timeline")


class JsonLinesConfig(Section):
    """Only the file metrics.jsonl of the run's folder, which every tracker writes too."""

    kind: Literal["jsonl"] = Field(description="jsonl = nothing but metrics.jsonl")
    timeline_steps: Natural = _TIMELINE


class TensorBoardConfig(Section):
    """Also TensorBoard's event files, in the folder `tensorboard` of the run's folder."""

    kind: Literal["tensorboard"] = Field(description="tensorboard = TensorBoard's files too")
    timeline_steps: Natural = _TIMELINE


class WandbConfig(Section):
    """Also one W&B run, in the folder `wandb` of the run's folder and online if logged in."""

    kind: Literal["wandb"] = Field(description="wandb = a W&B run too")
    mode: Literal["auto", "online", "offline"] = Field(
        description="auto = online if a key is found (wandb login), else offline"
    )
    project: Name = Field(description="W&B's project")
    entity: Name | None = Field(description="W&B's user or team; null = your default one")
    group: Name | None = Field(description="W&B's group; null = none")
    tags: list[Name] = Field(description="W&B's tags")
    timeout_s: Positive = Field(
        description="Longest wait for W&B's server at the start (in the background) and at the end"
    )
    timeline_steps: Natural = _TIMELINE


Tracker = Annotated[JsonLinesConfig | TensorBoardConfig | WandbConfig, Field(discriminator="kind")]


class MeshConfig(Section):
    """Group `mesh`: the connections between ranks."""

    kind: Literal["tcp"] = Field(description="tcp = our own mesh of sockets")
    security: Literal["auto", "tls", "loopback_plain", "insecure"] = Field(
        description="tls = encrypted, each rank with its own certificate; loopback_plain = "
        "authenticated only, for one machine; insecure = that between machines; auto = "
        "loopback_plain on one machine, tls between machines"
    )
    timeout_s: Positive = Field(
        description="Longest wait for a peer that is alive, before the run fails"
    )
    liveness: Literal["normal", "fast"] = Field(
        description="A silent peer counts as lost after 10 s (normal) or 4 s (fast)"
    )
    heartbeat_ms: Annotated[int, Field(ge=10, le=1000)] = Field(description="Heartbeat interval")


class ServingConfig(Section):
    """Group `serving`: how an inference server works (a task that is not built yet)."""

    mode: Literal["local"] = Field(description="local = the whole model on one rank")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(description="Port of the HTTP server")


class CollectivesBenchConfig(Section):
    """Collectives: smolrun's and gloo's, alternating."""

    name: Literal["collectives"]
    sizes: Annotated[list[Count], Field(min_length=1)] = Field(description="Bytes of the tensors")
    world_sizes: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = Field(
        description="Ranks"
    )
    repeats: Count = Field(description="Measurements of each; the median counts")


class LinkBenchConfig(Section):
    """An all_reduce and one plain TCP stream over the same link, alternating."""

    name: Literal["link"]
    sizes: Annotated[list[Count], Field(min_length=1)] = Field(description="Bytes of the tensors")
    world_sizes: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = Field(
        description="Ranks"
    )
    repeats: Count = Field(description="Measurements of each; the median counts")


class StepBenchConfig(Section):
    """A whole training step: smolrun's and torch's on gloo, alternating."""

    name: Literal["step"]
    peers: Annotated[list[Literal["ddp", "ddp-fp16", "ddp-bf16", "fsdp2"]], Field(min_length=1)] = (
        Field(
            description="Baselines: ddp = DistributedDataParallel, "
            "also with its fp16 and bf16 hooks; fsdp2 = fully_shard, for algorithm=fsdp"
        )
    )
    world_sizes: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = Field(
        description="Ranks"
    )
    steps: Count = Field(description="Steps in one measurement")
    warmup_steps: Natural = Field(description="Steps before it that do not count")
    repeats: Count = Field(description="Measurements of each; the median counts")


class UnequalBenchConfig(Section):
    """A step on ranks of unequal speed: proportional against equal batch shares."""

    name: Literal["unequal"]
    speeds: Annotated[list[Positive], Field(min_length=2)] = Field(description="Of each rank")
    global_batch_size: Count = Field(description="Samples of a step")
    sample_ms: Positive = Field(description="How long a rank of speed 1 computes for a sample")
    steps: Count = Field(description="Steps in one measurement")
    warmup_steps: Natural = Field(description="Steps before it that do not count")
    repeats: Count = Field(description="Measurements of each; the median counts")

    @property
    def world_sizes(self) -> list[int]:
        """As many ranks as speeds."""
        return [len(self.speeds)]


class StragglersBenchConfig(Section):
    """Steps with random stragglers, and an event simulation of the same trace."""

    name: Literal["stragglers"]
    world_sizes: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = Field(
        description="Ranks"
    )
    bounds: list[Natural] = Field(description="Staleness of classicdp")
    edp: bool = Field(description="Also algorithm=edp: a server, and workers on all other ranks")
    wait_fraction: NotNegative = Field(description="Of these workers, see algorithm.wait_fraction")
    steps: Count = Field(description="Steps in one measurement")
    step_ms: Positive = Field(description="How long a rank computes in a step")
    chance: Share = Field(description="Share of the steps that have a slow rank")
    factor: Positive = Field(description="How many times longer it takes")
    repeats: Count = Field(description="Measurements of each; the median counts")


Bench = Annotated[
    CollectivesBenchConfig
    | LinkBenchConfig
    | StepBenchConfig
    | UnequalBenchConfig
    | StragglersBenchConfig,
    Field(discriminator="name"),
]


class ExportConfig(Section):
    """Group `export`: how a trained model is written for other tools."""

    out: Name | None = Field(
        description="The folder to write, new or empty; null = a new one in the run's folder"
    )
    dtype: Literal["as_is", "float32", "bf16", "fp16"] = Field(
        description="Type of the numbers; as_is = as the model was trained"
    )


class DoctorConfig(Section):
    """Keys of `task=doctor`."""

    write: bool = Field(
        description="Write what was found into the cluster file: os, device, memory, speed, address"
    )
    format: Literal["text", "json"] = Field(description="Of its output; --json is the same")


class StatusConfig(Section):
    """Keys of `task=status`."""

    format: Literal["text", "json"] = Field(description="Of its output; --json is the same")


class TrustConfig(Section):
    """Keys of `task=trust`."""

    yes: bool = Field(description="Trust all new SSH host keys without a prompt, for scripts")


class ChosenRunConfig(Section):
    """Keys of `task=attach` and of `task=stop`."""

    run: Name = Field(description="latest (the newest), or a run folder or its name")


class SweepConfig(Section):
    """Keys about `smolrun -m`; none yet."""
