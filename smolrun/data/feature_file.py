"""Rows of features with a class each, kept as one file.

Shape suffixes: N samples, P features of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, cached
from smolrun.data.order import SampleOrder
from smolrun.data.prepared import Prepared
from smolrun.errors import DataError


@dataclass(frozen=True)
class Rows:
    """Features [N, P] and the class 0, 1, ... of each row [N]. Features are numbers, or bytes
    0..255, which a model is given as 0..1."""

    inputs_NP: numpy.ndarray
    targets_N: numpy.ndarray


def mixed(rows: Rows) -> Rows:
    """The rows shuffled, always alike: an evaluation of the first few must not meet one class."""
    size = len(rows.targets_N)
    order = SampleOrder(size, 0).indices(0, size) if size else []
    return Rows(rows.inputs_NP[order], rows.targets_N[order])


def prepare_features(
    cache_dir: Path, name: str, key: Mapping[str, Any], read: Callable[[], tuple[Rows, Rows]]
) -> Prepared:
    """Train and eval rows from the cache, or read now; `key` names what `read` gives.

    Raises DataError for rows that do not fit each other.
    """

    def make(folder: Path) -> dict[str, Any]:
        train, held_out = (_arrays(rows) for rows in read())
        num_classes = _check(name, train, held_out)
        tensors = {
            f"{part}_{what}": values
            for part, rows in (("train", train), ("eval", held_out))
            for what, values in (
                ("inputs", numpy.ascontiguousarray(rows.inputs_NP)),
                ("targets", rows.targets_N.astype(numpy.int64)),
            )
        }
        save_file(tensors, folder / DATA_FILE)
        sizes = {"train": len(train.targets_N), "eval": len(held_out.targets_N)}
        return {**sizes, "classes": num_classes, "features": train.inputs_NP.shape[1]}

    # The first format accepted labels of any kind, and truncated floats.
    entry = cached(cache_dir, name, {**key, "format": 2}, make)
    facts = entry.facts
    return Prepared(
        kind="features",
        path=str(entry.data_path),
        sha256=entry.sha256,
        num_outputs=facts["classes"],
        num_inputs=facts["features"],
        sequence_length=None,
        tokenizer=None,
        train_size=facts["train"],
        eval_size=facts["eval"],
        description=(
            f"{name}: {facts['train']:,} train and {facts['eval']:,} eval samples with "
            f"{facts['features']} features, {facts['classes']} classes"
        ),
    )


# By the kind of numpy's dtype: what to do about labels that are no classes.
_NUMBER_THEM = ": numpy.unique(labels, return_inverse=True)[1] numbers names"
_ADVICE = {
    "f": ": labels.astype(int) if they are whole, else cut them into classes by numpy.digitize",
    "U": _NUMBER_THEM,
    "O": _NUMBER_THEM,
}


def _arrays(rows: Rows) -> Rows:
    """The rows, also of lists and tensors."""
    return Rows(numpy.asarray(rows.inputs_NP), numpy.asarray(rows.targets_N))


def _check(name: str, train: Rows, held_out: Rows) -> int:
    """The number of classes."""
    for part, rows in (("train", train), ("eval", held_out)):
        inputs, targets = rows.inputs_NP, rows.targets_N
        if targets.ndim != 1 or targets.dtype.kind not in "iub":
            advice = _ADVICE.get(targets.dtype.kind, "")
            raise DataError(
                f"{name}: the {part} labels are {targets.dtype} {list(targets.shape)}; there must "
                f"be one integer 0, 1, ... for each row, the number of its class{advice}"
            )
        if inputs.ndim != 2 or inputs.dtype.kind not in "fiub":
            raise DataError(
                f"{name}: the {part} inputs are {inputs.dtype} {list(inputs.shape)}; they must be "
                "numbers [rows, features]"
            )
        if len(rows.inputs_NP) != len(rows.targets_N):
            raise DataError(
                f"{name}: there are {len(rows.inputs_NP):,} {part} samples but "
                f"{len(rows.targets_N):,} labels; the files do not belong together"
            )
        if not len(rows.targets_N):
            raise DataError(f"{name}: there is no {part} sample")
    if train.inputs_NP.shape[1] != held_out.inputs_NP.shape[1]:
        raise DataError(
            f"{name}: train samples have {train.inputs_NP.shape[1]} features, eval samples "
            f"{held_out.inputs_NP.shape[1]}"
        )
    num_classes = int(train.targets_N.max()) + 1
    if int(held_out.targets_N.max()) >= num_classes:
        highest = int(held_out.targets_N.max())
        raise DataError(f"{name}: eval has the class {highest}, train none above {num_classes - 1}")
    if min(int(train.targets_N.min()), int(held_out.targets_N.min())) < 0:
        raise DataError(f"{name}: some samples have no class (a label below 0)")
    return num_classes
