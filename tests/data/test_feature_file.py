"""Rows with a class each: what is no class, or no row, is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from smolrun.data.feature_file import Rows, prepare_features
from smolrun.data.prepared import Prepared
from smolrun.data.splits import open_split
from smolrun.errors import DataError

INPUTS = numpy.ones((3, 2), dtype="float32")


def prepare(folder: Path, inputs: Any, targets: Any) -> Prepared:
    rows = Rows(inputs, targets)
    return prepare_features(folder, "mine", {}, lambda: (rows, rows))


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (numpy.array([0.0, 1.5, 2.0]), r"labels are float64 \[3\].*numpy.digitize"),
        (numpy.array(["cat", "dog", "cat"]), "labels are <U3.*return_inverse"),
        (numpy.array(["cat", None, "cat"], dtype=object), "labels are object"),
        (numpy.array([[0, 1], [1, 0], [0, 1]]), r"labels are int64 \[3, 2\]"),
        (numpy.array([0, -1, 1]), "below 0"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, targets: numpy.ndarray, what: str) -> None:
    with pytest.raises(DataError, match=what):
        prepare(tmp_path, INPUTS, targets)


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        (INPUTS.astype(str), "inputs are <U"),
        (INPUTS[:, 0], r"inputs are float32 \[3\]"),
        (INPUTS.astype(complex), "inputs are complex128"),
    ],
)
def test_inputs_that_are_no_rows(tmp_path: Path, inputs: numpy.ndarray, what: str) -> None:
    with pytest.raises(DataError, match=what):
        prepare(tmp_path, inputs, numpy.array([0, 1, 0]))


@pytest.mark.parametrize(
    "targets", [[0, 2, 1], numpy.array([0, 2, 1], dtype="uint8"), torch.tensor([0, 2, 1])]
)
def test_lists_tensors_and_every_kind_of_integer_are_classes(tmp_path: Path, targets: Any) -> None:
    prepared = prepare(tmp_path, INPUTS.tolist(), targets)
    batch = open_split(prepared, "train", verify=True).batch([0, 1, 2])
    assert (prepared.num_outputs, batch.targets.tolist()) == (3, [0, 2, 1])
    assert batch.inputs.dtype == torch.float32


def test_a_file_of_ones_own_with_other_targets_is_refused(tmp_path: Path) -> None:
    """A Prepared need not come from prepare_features."""
    prepared = prepare(tmp_path, INPUTS, [0, 1, 0])
    tensors = load_file(prepared.path)
    save_file({**tensors, "train_targets": torch.tensor([0.2, 1.7, 0.1])}, prepared.path)
    with pytest.raises(DataError, match="train targets are float32"):
        open_split(prepared, "train", verify=False)
