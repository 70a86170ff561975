"""Groups of plain settings.

How to train, with which optimizer, how often to look, what to measure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from smolrun.config.base import Auto, Count, Name, Natural, NotNegative, Positive, Section, Share
from smolrun.log_records import since

TensorSizes = Annotated[list[Count], Field(min_length=1)]  # bytes
WorldSizes = Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]


class StalenessConfig(Section):
    """Group `staleness`: how stale a gradient may be when it is applied."""

    bound: Auto | Natural


class QuantizationConfig(Section):
    """Group `quantization`: in which type gradients are sent."""

    kind: Literal["none", "int8", "fp16", "bf16"]
    block: Annotated[int, Field(ge=8, le=65536)]
    error_feedback: bool


class TrainingConfig(Section):
    """Group `training`: the loop."""

    steps: Count
    global_batch_size: Count
    micro_batch_size: Auto | Count
    eval_every: Natural
    eval_batches: Count | None
    grad_clip: NotNegative
    warmup_steps: Natural = Field(json_schema_extra={"allowed": "auto or an integer >= 0"})
    lr_schedule: Literal["cosine", "linear", "constant"]
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)]
    check_replicas: bool
    resync_every: Auto | Natural
    sample_tokens: Natural
    sample_prompt: str
    sample_before: bool
    recompute: bool
    dry_run: bool
    log_norms: Literal["none", "gradients", "all"]
    log_norms_every: Count

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

    every: Natural
    keep: Count
    keep_best: bool
    resume: Name | None
    weights: Name | None
    trust_run_folder: bool


Url = Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$")]


class _TrackerConfig(Section):
    """Keys of all trackers."""

    timeline_steps: Natural
    loki: Url | None = Field(
        json_schema_extra={"allowed": "null, or a URL without a password: http://HOST:3100"}
    )
    prometheus: Annotated[int, Field(ge=0, le=65535)] | None
    prometheus_bind: Name


class JsonLinesConfig(_TrackerConfig):
    """Only the file metrics.jsonl of the run's folder, which every tracker writes too."""

    kind: Literal["jsonl"]


class TensorBoardConfig(_TrackerConfig):
    """Also TensorBoard's event files, in the folder `tensorboard` of the run's folder."""

    kind: Literal["tensorboard"]


class WandbConfig(_TrackerConfig):
    """Also one W&B run, in the folder `wandb` of the run's folder and online if logged in."""

    kind: Literal["wandb"]
    mode: Literal["auto", "online", "offline"]
    project: Name
    entity: Name | None
    group: Name | None
    tags: list[Name]
    timeout_s: Positive


Tracker = Annotated[JsonLinesConfig | TensorBoardConfig | WandbConfig, Field(discriminator="kind")]


class TcpMeshConfig(Section):
    """Our own connections."""

    kind: Literal["tcp"]
    security: Literal["auto", "tls", "loopback_plain", "insecure"]
    timeout_s: Positive
    liveness: Literal["normal", "fast"]
    heartbeat_ms: Annotated[int, Field(ge=10, le=1000)]


class TorchMeshConfig(Section):
    """Process groups of torch.distributed."""

    kind: Literal["torch"]
    backend: Literal["auto", "gloo"]
    security: Literal["auto", "loopback_plain", "insecure"]
    timeout_s: Positive


Mesh = Annotated[TcpMeshConfig | TorchMeshConfig, Field(discriminator="kind")]


def _has_no_default_port(origin: str) -> str:
    if re.search(r"^http:.*:80$|^https:.*:443$", origin):
        raise ValueError("browsers leave this port out")
    return origin


# As they stand in the headers of a request: an entry of another form would never match.
HostName = Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])$")]
Origin = Annotated[
    str,
    Field(pattern=r"^[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:[0-9]{1,5})?$"),
    AfterValidator(_has_no_default_port),
]


class ServingConfig(Section):
    """Group `serving`: the inference server, and what generates text in the terminal."""

    mode: Literal["auto", "local", "pipeline", "replicas"]
    hosts: Literal["auto", "all"]
    spare: Literal[0, 1]
    follow: Literal["run"] | None = Field(
        json_schema_extra={"allowed": "null, or run: newer checkpoints of model.run are taken up"}
    )
    layers: list[list[Natural]] | None = Field(
        json_schema_extra={"allowed": "null, or [first, last] of every rank, [] for none"}
    )
    weights: Literal["auto", "float32", "bf16", "int8", "int4"]
    context: Auto | Annotated[int, Field(ge=2)]
    slots: Auto | Annotated[int, Field(ge=1, le=1024)]
    prefill_chunk: Count
    prefix_reuse: bool
    batch_invariant: bool
    max_queue: Natural
    port: Annotated[int, Field(ge=0, le=65535)]
    bind: Name
    allowed_hosts: list[HostName] = Field(
        json_schema_extra={"allowed": "a list of names or addresses without a port, or * for any"}
    )
    history: Literal["browser", "server"]
    cors_origins: list[Origin] = Field(
        json_schema_extra={
            "allowed": "a list of origins as browsers send them, without a path or a slash at the "
            "end: http://localhost:3000"
        }
    )
    compare_with: list[Origin] = Field(
        json_schema_extra={
            "allowed": "a list of servers without a path or a slash at the end: http://mini1:7665"
        }
    )
    request_timeout_s: Positive
    drain_s: NotNegative
    unload_after_min: Positive | None
    min_free_gb: Auto | NotNegative
    service: bool | Literal["install"]
    temperature: Auto | Annotated[float, Field(ge=0, le=2)]
    top_p: Auto | Annotated[float, Field(gt=0, le=1)]
    max_tokens: Auto | Count
    url: Url | None = Field(
        json_schema_extra={"allowed": "null, or the address of a server: http://HOST:PORT"}
    )


class _SizesBenchConfig(Section):
    """Keys of a bench of one operation at several sizes."""

    sizes: TensorSizes
    world_sizes: WorldSizes
    repeats: Count


class CollectivesBenchConfig(_SizesBenchConfig):
    """Collectives: smolrun's and gloo's, alternating."""

    name: Literal["collectives"]


class LinkBenchConfig(_SizesBenchConfig):
    """An all_reduce and one plain TCP stream over the same link, alternating."""

    name: Literal["link"]


class StepBenchConfig(Section):
    """A whole training step: smolrun's and torch's on gloo, alternating."""

    name: Literal["step"]
    peers: Annotated[
        list[Literal["ddp", "ddp-fp16", "ddp-bf16", "fsdp2", "pipelining"]], Field(min_length=1)
    ]
    world_sizes: WorldSizes
    steps: Count
    warmup_steps: Natural
    repeats: Count


class _SpeedsBenchConfig(Section):
    """Keys of a bench on ranks of unequal speed."""

    speeds: Annotated[list[Positive], Field(min_length=2)]

    @property
    def world_sizes(self) -> list[int]:
        """As many ranks as speeds."""
        return [len(self.speeds)]


class UnequalBenchConfig(_SpeedsBenchConfig):
    """A step on ranks of unequal speed: proportional against equal batch shares."""

    name: Literal["unequal"]
    global_batch_size: Count
    sample_ms: Positive
    steps: Count
    warmup_steps: Natural
    repeats: Count


class StragglersBenchConfig(Section):
    """Steps with random stragglers, and an event simulation of the same trace."""

    name: Literal["stragglers"]
    world_sizes: WorldSizes
    bounds: list[Natural]
    edp: bool
    wait_fraction: NotNegative
    steps: Count
    step_ms: Positive
    chance: Share
    factor: Positive
    repeats: Count


class PipelineBenchConfig(_SpeedsBenchConfig):
    """A pipeline: its schedules and their simulation, its cut and other ones."""

    name: Literal["pipeline"]
    layers: Count
    layer_ms: Positive
    schedules: Annotated[list[Literal["gpipe", "1f1b"]], Field(min_length=1)]
    micro_batches: Count
    cut_micro_batches: Count
    splits: Natural
    steps: Count
    repeats: Count


class ServingBenchConfig(Section):
    """Tokens per second of stages on ranks, beside one process and other engines."""

    name: Literal["serving"]
    world_sizes: Annotated[list[Count], Field(min_length=1)]
    dtype: Literal["float32", "bf16", "int8", "int4"]
    layers: Count
    streams: Annotated[list[Count], Field(min_length=1)]
    prompt_tokens: Count
    new_tokens: Count
    peers: Annotated[list[Literal["one process", "HF generate", "llama.cpp"]], Field(min_length=1)]
    repeats: Count


Bench = Annotated[
    CollectivesBenchConfig
    | LinkBenchConfig
    | StepBenchConfig
    | UnequalBenchConfig
    | StragglersBenchConfig
    | PipelineBenchConfig
    | ServingBenchConfig,
    Field(discriminator="name"),
]


class ExportConfig(Section):
    """Group `export`: how a trained model is written for other tools."""

    out: Name | None
    dtype: Literal["as_is", "float32", "bf16", "fp16"]


class CompareConfig(Section):
    """Keys of `task=compare`."""

    runs: Name | list[Name] | None
    sweep: Name | None
    metric: Literal[
        "auto",
        "time_to_loss_s",
        "final_train_loss",
        "final_eval_loss",
        "tokens_per_s",
        "step_s",
        "wall_s",
        "bytes_sent",
        "peak_memory_bytes",
    ]
    out: Name | None
    wandb: bool


class DoctorConfig(Section):
    """Keys of `task=doctor`."""

    write: bool
    format: Literal["text", "json"]
    report: bool


class StatusConfig(Section):
    """Keys of `task=status`."""

    format: Literal["text", "json"]


def _is_time(text: str) -> str:
    since(text, datetime.now().astimezone())
    return text


class LogsConfig(Section):
    """Keys of `task=logs`."""

    run: Name
    follow: bool
    rank: Natural | list[Natural] | None
    level: Literal["debug", "info", "warning", "error"] | None
    since: Annotated[str, AfterValidator(_is_time)] | None = Field(
        json_schema_extra={"allowed": "null, or a time like 10m, 2h, 1d or 2026-12-31T18:00"}
    )
    format: Literal["text", "json"]


class TrustConfig(Section):
    """Keys of `task=trust`."""

    yes: bool
    forget: Name | None


class NearbyConfig(Section):
    """Key of `task=nearby`."""

    wait_s: Positive


class JoinConfig(Section):
    """Keys of `task=join`."""

    name: Name | None
    address: Name | None
    yes: bool
    remember: bool


class ConversationConfig(Section):
    """Key of task=chat."""

    system: str | None


class GenerateConfig(Section):
    """Key of task=generate."""

    prompt: str | None


class ChosenRunConfig(Section):
    """Keys of `task=attach` and of `task=stop`."""

    run: Name


class WatchConfig(Section):
    """Keys of `task=watch`."""

    run: Name
    replay: bool
    speed: Annotated[float, Field(gt=0, le=4096)]


class SweepConfig(Section):
    """Keys of `smolrun -m`."""

    repeats: Annotated[int, Field(ge=1, le=1000)]
    fail_fast: bool
    resume: Name | None
    metric: Literal[
        "final_eval_loss",
        "final_train_loss",
        "tokens_per_s",
        "wall_s",
        "bytes_sent",
        "peak_memory_bytes",
    ]
