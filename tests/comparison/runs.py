"""Run folders made by hand, whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from smolrun.comparison.run_figures import RunFigures, read_run
from smolrun.comparison.selection import Job
from smolrun.tracking.run_folder import RunFolder

TOKENS = 1000  # of a step


def config(**changes: Any) -> dict[str, Any]:
    """A configuration as far as comparisons read it; `a__b=1` changes key b of group a."""
    made: dict[str, Any] = {
        "seed": 0,
        "algorithm": {"name": "classicdp", "bucket_mb": 4.0},
        "model": {"name": "gpt_tiny"},
        "data": {"name": "python_stdlib"},
        "quantization": {"kind": "none"},
        "optimizer": {"name": "adamw", "lr": 0.003},
        "training": {"steps": 20, "warmup_steps": 2},
        "cluster": {"name": "local", "hosts": None},
    }
    for path, value in changes.items():
        group, _, key = path.partition("__")
        if key:
            made[group] = {**made[group], key: value}
        else:
            made[group] = value
    return made


def events(
    *,
    steps: int = 20,
    step_s: float = 1.0,
    start: float = 5.0,
    slope: float = 0.1,
    sent: int = 100,
    ranks: int = 2,
) -> list[dict[str, Any]]:
    """The loss falls by `slope` a step; a rank sends `sent` bytes in it and computes half of it."""
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        for rank in range(ranks):
            row = {"event": "rank_step", "step": step, "rank": rank, "memory_bytes": 1000 + rank}
            seconds = {"compute_s": step_s / 2, "wait_s": step_s / 4}
            rows.append({**row, **seconds, "bytes_sent": sent, "samples": 8})
        row = {"event": "step", "step": step, "rank": None, "time_s": step_s * (step + 1)}
        rows.append({**row, "loss": start - slope * step, "tokens": TOKENS})
    return rows


def write_run(
    path: Path,
    settings: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    summary: dict[str, Any] | None = None,
) -> RunFolder:
    """A run that has ended, unless `summary` is empty."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    folder.config.write_text(yaml.safe_dump(config() if settings is None else settings))
    rows = events() if rows is None else rows
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = {"status": "done", "wall_s": 30.0, "world_size": 2, "versions": {"smolrun": "0.1.0"}}
    if summary != {}:
        folder.write_summary({**usual, **(summary or {})})
    return folder


def job(path: Path, *args: Any, **more: Any) -> tuple[Job, RunFigures]:
    """The job and the figures of a run that is written to `path`."""
    folder = write_run(path, *args, **more)
    return Job(folder, folder.run_id), read_run(folder)
