"""The configuration of a run: its classes, its checks, and which rank lives where.

Knows nothing of Hydra (the command line composes), torch or sockets. `validate` is the only way to
a RunConfig that has been checked; layers below the driver get plain keyword arguments, never one of
these objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smolrun.config import checks, problems
from smolrun.config.plan import (
    RankPlan,
    are_replicas,
    has_dedicated_server,
    linked,
    min_ranks_left,
    ranks,
    savers,
    world_size,
)
from smolrun.config.run import RunConfig, config_hash, redacted, resolved
from smolrun.errors import ConfigError

__all__ = [
    "RankPlan",
    "RunConfig",
    "are_replicas",
    "config_hash",
    "has_dedicated_server",
    "linked",
    "min_ranks_left",
    "ranks",
    "redacted",
    "resolved",
    "savers",
    "validate",
    "world_size",
]


def validate(data: Mapping[str, Any]) -> RunConfig:
    """The checked configuration, from plain values without interpolations.

    ConfigError with every problem found.
    """
    found: list[str] = []
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        found += problems.lines(error, data)
    found += checks.problems(_valid_groups(data) if config is None else dict(config))
    if config is None or found:
        raise ConfigError(found)
    return config


def _valid_groups(data: Mapping[str, Any]) -> dict[str, Any]:
    """The groups that are right by themselves."""
    valid: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        try:
            valid[name] = TypeAdapter(field.rebuild_annotation()).validate_python(data.get(name))
        except ValidationError:
            continue
    return valid
