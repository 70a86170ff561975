"""Rules about replicas: who may cut them, and who has any to keep equal. Each as in checks.py."""

from __future__ import annotations

from collections.abc import Iterator

from smolrun.config.algorithms import EDP, FSDP, Algorithm, ClassicDP, Single
from smolrun.config.optimizers import Optimizer
from smolrun.config.settings import Training
from smolrun.config.suggest import problem


def optimizer_fits_owner(*, optimizer: Optimizer, algorithm: Algorithm) -> Iterator[str]:
    """Owners step slices, which end in the middle of matrices."""
    is_cut = isinstance(algorithm, ClassicDP) and algorithm.owner_computes is True
    if is_cut and optimizer.name == "adafactor":
        yield problem(
            "algorithm.owner_computes",
            True,
            "cuts matrices among the ranks, and optimizer=adafactor looks at whole ones",
            allowed="auto or false, where training.resync_every keeps replicas equal; or "
            "optimizer=adamw, lion, sgd",
        )


def there_are_replicas(*, training: Training, algorithm: Algorithm) -> Iterator[str]:
    """Only what is there several times can become equal again."""
    if training.resync_every in ("auto", 0):
        return
    why = ""
    if isinstance(algorithm, Single):
        why = "algorithm=single has one copy of the model"
    elif isinstance(algorithm, FSDP) and algorithm.stage == 3:
        why = "fsdp stage 3 has every parameter on one rank only"
    elif isinstance(algorithm, EDP):
        why = "the ranks of edp have weights of different age, so no two need be equal"
    if why:
        yield problem("training.resync_every", training.resync_every, why, allowed="auto or 0")
