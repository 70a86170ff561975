"""Going on with a run: its own configuration, with what was typed now on top.

    stored (the run's config.yaml)   seed 3   model gpt_small   training.steps 1000
    typed  checkpoint.resume=latest training.steps=2000
    gives                            seed 3   model gpt_small   training.steps 2000

Only keys that leave what was learnt so far meaningful may differ; all others are refused, each by
name. Pure: knows of no files.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smolrun.config.suggest import problem
from smolrun.config.synonyms import RENAMED_KEYS

_COMMIT = re.compile(r"[0-9a-f]{40}")
MAY_CHANGE = (
    "algorithm",
    "attach",
    "bench",
    "checkpoint",
    "cluster",
    "compare",
    "console",
    "data.prefetch_steps",
    "detach",
    "doctor",
    "driver",
    "logs",
    "mesh",
    "nearby",
    "quantization",
    "run_name",
    "serving",
    "status",
    "stop",
    "sweep",
    "task",
    "tracker",
    "training.check_replicas",
    "training.dry_run",
    "training.eval_batches",
    "training.eval_every",
    "training.micro_batch_size",
    "training.log_norms",
    "training.log_norms_every",
    "training.recompute",
    "training.resync_every",
    "training.sample_before",
    "training.sample_prompt",
    "training.sample_tokens",
    "training.steps",
    "trust",
    "watch",
)
"""Keys, and groups of keys, that a resumed run may have otherwise than before."""


def on_top(
    stored: Mapping[str, Any], composed: Mapping[str, Any], typed: Sequence[str]
) -> dict[str, Any]:
    """The stored configuration with every key of `typed` taken from the composed one.

    `typed` are keys (`training.steps`) and names of groups (`cluster`), as on the command line.
    """
    merged = copy.deepcopy(dict(stored))
    for path in typed:
        *groups, key = path.split(".")
        source: Any = composed
        for group in groups:
            source = source.get(group) if isinstance(source, Mapping) else None
        if isinstance(source, Mapping) and key in source:
            target = merged
            for group in groups:
                target[group] = target.get(group) or {}  # null where the run had none
                target = target[group]
            target[key] = copy.deepcopy(source[key])
    return merged


def keep_commit(stored: Mapping[str, Any], merged: dict[str, Any]) -> None:
    """A hub model stays at the commit that the run began with, also where the branch, or nothing,
    is typed again; another commit is a difference."""
    before, now = stored.get("model"), merged.get("model")
    if isinstance(before, Mapping) and isinstance(now, dict) and "revision" in now:
        is_same = before.get("name") == now.get("name")
        if is_same and not _COMMIT.fullmatch(str(now["revision"])) and before.get("revision"):
            now["revision"] = before["revision"]


def with_current_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version stored, by the names that its keys have now."""
    renamed = copy.deepcopy(dict(stored))
    for old, new in RENAMED_KEYS.items():
        group, _, key = old.rpartition(".")
        section = renamed.get(group) if group else renamed
        if not isinstance(section, dict) or key not in section:
            continue
        # A user's own class may have a key of the same name.
        if not str(section.get("target", "smolrun.")).startswith("smolrun."):
            continue
        value = section.pop(key)
        if new is not None:
            section.setdefault(new.rpartition(".")[2], value)
    return renamed


def completed(stored: Mapping[str, Any], composed: Mapping[str, Any]) -> dict[str, Any]:
    """What an older version stored, under the keys of this one, and with those that it lacks.

    A group is completed where it is about the same thing: the same target, name or kind.
    """
    stored = with_current_keys(stored)
    whole = dict(stored)
    for group, now in composed.items():
        before = stored.get(group, now)
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            tag = next((tag for tag in ("target", "name", "kind") if tag in now), None)
            if tag is None or before.get(tag) == now[tag]:
                before = {**now, **before}
        whole[group] = before
    return whole


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A problem for every key that differs and must not; one for a group of another name."""
    before, after = dict(_leaves(stored)), dict(_leaves(now))
    found = []
    for path in sorted({*before, *after}):
        may = any(path == key or path.startswith(f"{key}.") for key in MAY_CHANGE)
        if not may and before.get(path) != after.get(path):
            found.append(path)
    groups = Counter(path.partition(".")[0] for path in found)
    # With another model nearly every key of it differs, and that says no more than its name.
    renamed = [group for group in groups if f"{group}.name" in found and groups[group] > 1]
    for key in dict.fromkeys(_named(path, renamed) for path in found):
        path = f"{key}.name" if key in renamed else key
        what = "differs from the run being resumed"
        yield problem(key, after.get(path), what, allowed=str(before.get(path)))


def _named(path: str, groups: Sequence[str]) -> str:
    """The group of a key, if it is one of these, or else the key."""
    group = path.partition(".")[0]
    return group if group in groups else path


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
