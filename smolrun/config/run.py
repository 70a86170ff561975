"""The whole configuration of a run, and its plain form that travels to the workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from smolrun.config.algorithms import AnyAlgorithm
from smolrun.config.base import Name, Section
from smolrun.config.cluster import ClusterConfig
from smolrun.config.data import AnyData
from smolrun.config.models import AnyModel
from smolrun.config.optimizers import Optimizer
from smolrun.config.settings import (
    Bench,
    CheckpointConfig,
    ChosenRunConfig,
    CompareConfig,
    ConversationConfig,
    DoctorConfig,
    ExportConfig,
    GenerateConfig,
    JoinConfig,
    LogsConfig,
    Mesh,
    NearbyConfig,
    QuantizationConfig,
    ServingConfig,
    StalenessConfig,
    StatusConfig,
    SweepConfig,
    Tracker,
    TrainingConfig,
    TrustConfig,
    WatchConfig,
)
from smolrun.sanitize import without_credentials, without_credentials_in


class RunConfig(Section):
    """Everything about one run, composed and resolved once on the driver.

    Ranks get it as it is, with its hash.
    """

    task: Literal[
        "train",
        "serve",
        "generate",
        "chat",
        "bench",
        "export",
        "init",
        "setup",
        "trust",
        "doctor",
        "status",
        "attach",
        "logs",
        "watch",
        "stop",
        "clean",
        "compare",
        "nearby",
        "join",
    ]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        json_schema_extra={"allowed": "an integer >= 0"}
    )
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = Field(
        json_schema_extra={
            "allowed": "letters, digits, dot, dash and underscore (100 at most), or null"
        }
    )
    detach: bool
    console: Literal["auto", "dashboard"]
    driver: Name | None
    precision: Literal["float32", "bf16", "fp16", "bf16_params", "float64"]
    cluster: ClusterConfig
    algorithm: AnyAlgorithm
    model: AnyModel
    data: AnyData
    staleness: StalenessConfig
    quantization: QuantizationConfig
    optimizer: Optimizer
    training: TrainingConfig
    checkpoint: CheckpointConfig
    tracker: Tracker
    mesh: Mesh
    serving: ServingConfig
    bench: Bench
    export: ExportConfig
    attach: ChosenRunConfig
    chat: ConversationConfig
    compare: CompareConfig
    doctor: DoctorConfig
    generate: GenerateConfig
    logs: LogsConfig
    nearby: NearbyConfig
    join: JoinConfig
    pairing_code: Name | None
    status: StatusConfig
    stop: ChosenRunConfig
    trust: TrustConfig
    watch: WatchConfig
    sweep: SweepConfig
    _typed: tuple[str, ...] = PrivateAttr(())

    @property
    def typed(self) -> tuple[str, ...]:
        """The words of the command line after `smolrun`, without credentials in URLs; empty where
        there was none. They are no part of the configuration, its hash and its plain form."""
        return self._typed

    def with_typed(self, words: Iterable[str]) -> RunConfig:
        """The same configuration, which knows these words."""
        same = self.model_copy()
        same._typed = tuple(
            without_credentials(word) for word in words if not word.startswith("pairing_code=")
        )
        return same


def resolved(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON values; `validate` makes an equal RunConfig from it."""
    return config.model_dump(mode="json")


def redacted(config: RunConfig) -> dict[str, Any]:
    """As `resolved`, without the credentials in URLs of `env:` and the pairing code: what may be
    kept in files, and sent to every rank. A resumed run takes them from the cluster file again."""
    plain = resolved(config)
    for host in plain["cluster"]["hosts"] or []:
        host["env"] = without_credentials_in(host["env"])
    plain["pairing_code"] = None
    return plain


def config_hash(config: RunConfig) -> str:
    """16 hex digits that are equal exactly when two configurations are."""
    text = json.dumps(
        redacted(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
