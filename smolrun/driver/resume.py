"""checkpoint.resume on the driver: finds the checkpoint, checks that the run can resume from it,
and restores the run's folder to it."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from smolrun.checkpoints.find import checkpoints_in, read_manifest
from smolrun.checkpoints.folder import remove_leftovers
from smolrun.checkpoints.manifest import Manifest
from smolrun.checkpoints.run_names import locate
from smolrun.config import RunConfig, redacted
from smolrun.config.suggest import problem
from smolrun.errors import CheckpointError, ConfigError
from smolrun.files import read_yaml
from smolrun.tracking.jsonl import forget_from
from smolrun.tracking.run_folder import OUTPUTS, RunFolder

SET_ASIDE = ".set-aside"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes: after `updates` updates and `time_s` seconds of training.

    Without a checkpoint it starts from step 0, in the same folder.
    """

    folder: RunFolder
    checkpoint: Path | None
    updates: int
    time_s: float
    train_loss: float | None
    eval_loss: float | None
    data_sha256: str | None
    driver_state: Mapping[str, Any]

    @property
    def wall_s(self) -> float:
        """Seconds from the command to the checkpoint, of all starts; of older checkpoints those of
        training."""
        found = self.driver_state.get("wall_s")
        return found if isinstance(found, float) and 0 <= found < 1e12 else self.time_s


def find_resume_point(
    config: RunConfig, say: Callable[[str], None], closing: ExitStack
) -> ResumePoint | None:
    """Where to resume; None for a new run. ConfigError if the run cannot be resumed.

    Claims the run for this driver until `closing` ends.
    """
    wanted = config.checkpoint.resume
    if wanted is None:
        return None
    try:
        path, checkpoint = locate(wanted, OUTPUTS, lambda text: say(f"warning: {text}"))
        manifest = read_manifest(checkpoint)
        folder = RunFolder(below_outputs(path))
        folder.refuse_links_outside()
    except CheckpointError as error:
        raise ConfigError(problem("checkpoint.resume", wanted, str(error))) from None
    if folder.driver_lives() or not folder.claim():
        what = f"the run {folder.run_id} is still running; stop it first"
        raise ConfigError(problem("checkpoint.resume", wanted, what))
    closing.callback(folder.release)
    if manifest.step >= config.training.steps:
        what = f"the run {folder.run_id} has made {manifest.step} steps already"
        if manifest.step >= _planned_steps(folder):
            what = f"{what}, it is finished"
        allowed = (
            f"more than {manifest.step}; to train longer: "
            f"smolrun checkpoint.resume={wanted} training.steps=N"
        )
        raise ConfigError(problem("training.steps", config.training.steps, what, allowed=allowed))
    return resume_point_of(folder, checkpoint, manifest)


def find_weights(
    config: RunConfig, resume: ResumePoint | None, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint whose weights the run begins with; None where it has others. ConfigError if
    there is none."""
    wanted = config.checkpoint.weights
    if wanted is None or (resume is not None and resume.checkpoint is not None):
        return None
    try:
        folder, checkpoint = locate(wanted, OUTPUTS, lambda text: say(f"warning: {text}"))
    except CheckpointError as error:
        raise ConfigError(problem("checkpoint.weights", wanted, str(error))) from None
    say(f"beginning with the weights of {folder.name}, {checkpoint.name}")
    return checkpoint


def below_outputs(folder: Path) -> Path:
    """A folder of outputs/ as a new run prints its own; others as they are."""
    outputs = OUTPUTS.resolve()
    return OUTPUTS / folder.relative_to(outputs) if folder.is_relative_to(outputs) else folder


def _planned_steps(folder: RunFolder) -> float:
    """Of the run as it was started last; infinite where that is not known."""
    try:
        stored = msgspec.yaml.decode(read_yaml(folder.config))
        return int(stored["training"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def resume_point_of(folder: RunFolder, checkpoint: Path, manifest: Manifest) -> ResumePoint:
    """What a checkpoint of the run says about it."""
    training = manifest.state.get("training") or {}
    data = manifest.state.get("data") or {}
    return ResumePoint(
        folder,
        checkpoint,
        manifest.step,
        float(training.get("time_s", 0.0)),
        training.get("train_loss"),
        training.get("eval_loss"),
        data.get("sha256"),
        manifest.state.get("driver") or {},
    )


def check_data(resume: ResumePoint, sha256: str) -> None:
    """ConfigError if the data is not what the run was trained on."""
    if resume.data_sha256 not in (None, sha256):
        raise ConfigError(
            f"the data has changed since {resume.folder.run_id} was trained on it: its hash is "
            f"{sha256[:12]}, it was {str(resume.data_sha256)[:12]}; bring the old data back, or "
            "start a new run without checkpoint.resume"
        )


def restore_folder(
    resume: ResumePoint, config: RunConfig, say: Callable[[str], None], undo: ExitStack
) -> None:
    """Restore the run's folder to the state of the checkpoint; `undo` gets what reverts that, for a
    run that then cannot begin. OSError passes.

    Checkpoints newer than the one resumed from are renamed, not deleted.
    """
    folder = resume.folder
    old = folder.path / "config.yaml"
    undo.callback(folder.write_config, old.read_text(encoding="utf-8"))
    folder.write_config(msgspec.yaml.encode(redacted(config)).decode())
    before = folder.metrics.with_name(".metrics.jsonl.before")
    if folder.metrics.exists():
        shutil.copyfile(folder.metrics, before)
        undo.callback(os.replace, before, folder.metrics)
    forget_from(folder.metrics, resume.updates)
    remove_leftovers(folder.checkpoints)
    for step, path in checkpoints_in(folder.checkpoints):
        if step > resume.updates:
            aside = _free_name(path)
            path.rename(aside)
            undo.callback(os.replace, aside, path)
            say(f"a newer checkpoint is renamed to {aside.name}")
    if resume.checkpoint is None:
        say("starting over from step 0: there is no valid checkpoint")
    else:
        say(f"resuming after step {resume.updates}, from {resume.checkpoint.name}")


def discard_backup(resume: ResumePoint) -> None:
    """Delete the copy of metrics.jsonl that `restore_folder` made: the run has begun."""
    resume.folder.metrics.with_name(".metrics.jsonl.before").unlink(missing_ok=True)


def _free_name(path: Path) -> Path:
    """Where a checkpoint can be set aside; others of its step may be there already."""
    names = (f"{path.name}{SET_ASIDE}{number}" for number in itertools.chain([""], count(2)))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())
