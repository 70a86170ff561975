"""What the end of a training run means, beyond what the ranks said: was all saved, and what would
have helped."""

from __future__ import annotations

import dataclasses

from smolrun.checkpoints.keeper import Keeper
from smolrun.config import RunConfig
from smolrun.launch.control import EXIT_FAILED
from smolrun.launch.moves import Outcome


def unsaved(outcome: Outcome, keeper: Keeper) -> Outcome:
    """A run whose last checkpoint could not be written has failed, however well it trained."""
    if keeper.failure is None or outcome.status == "failed":
        return outcome
    return dataclasses.replace(
        outcome, status="failed", exit_code=EXIT_FAILED, reason=keeper.failure
    )


def with_advice(config: RunConfig, outcome: Outcome) -> Outcome:
    """What would save most memory, where that was the end of the run."""
    if not outcome.out_of_memory:
        return outcome
    from smolrun.tasks.dry_run_text import with_remedies  # loads torch

    return with_remedies(config, outcome)
