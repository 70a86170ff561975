"""One split (train or eval) of prepared data, read in batches.

Knows nothing of ranks: the caller decides which samples a rank reads (order.py gives the order).
Shape suffixes: B batch, T tokens, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolrun.data.prepared import Prepared, Progress
from smolrun.errors import DataError
from smolrun.files import file_hash

__all__ = ["Batch", "Prepared", "Progress", "Split", "open_split"]

IGNORE_INDEX = -100  # a target without a loss, as torch.nn.functional.cross_entropy has it


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of some samples.

    Tokens: int64 [B, T] both, targets are the inputs' next tokens, IGNORE_INDEX where there is
    no loss. Features: float32 [B, F] and int64 [B]. `position` counts samples from the
    run's first one to the first one here: random draws are keyed by it.
    """

    inputs: Tensor
    targets: Tensor
    position: int = 0


class Split(ABC):
    """Samples 0 .. len - 1 of a memory-mapped file: only a batch's own samples are read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _gather(self, indices: numpy.ndarray) -> Batch: ...

    def batch(self, indices: Sequence[int], position: int = 0) -> Batch:
        """The samples `indices`, in that order; no indices give a batch of size 0.

        Raises IndexError for an index that is not within 0 .. len - 1.
        """
        wrong = [index for index in indices if not 0 <= index < len(self)]
        if wrong:
            raise IndexError(f"sample {wrong[0]} is not within 0 .. {len(self) - 1}")
        gathered = self._gather(numpy.asarray(indices, dtype=numpy.int64))
        return replace(gathered, position=position)


class TokenSplit(Split):
    """A long row of tokens cut into windows: sample i reads iT .. iT+T-1, predicts iT+1 .. iT+T."""

    def __init__(self, tokens: Tensor, sequence_length: int) -> None:
        self._tokens = tokens.numpy()  # numpy, because torch cannot index its own uint16
        self._offsets = numpy.arange(sequence_length + 1)
        self._size = max(0, len(tokens) - 1) // sequence_length

    def __len__(self) -> int:
        return self._size

    def _gather(self, indices: numpy.ndarray) -> Batch:
        starts = indices * (len(self._offsets) - 1)
        window = torch.from_numpy(self._tokens[starts[:, None] + self._offsets].astype(numpy.int64))
        return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())


class MaskedSplit(Split):
    """Rows of tokens [N, T + 1]; targets where `loss_mask` is 0 are IGNORE_INDEX."""

    def __init__(self, tokens: Tensor, loss_mask: Tensor) -> None:
        if tokens.shape != loss_mask.shape or tokens.dim() != 2:
            raise DataError(f"a mask of {loss_mask.shape} does not fit tokens of {tokens.shape}")
        self._tokens, self._loss_mask = tokens.numpy(), loss_mask.numpy()

    def __len__(self) -> int:
        return len(self._tokens)

    def _gather(self, indices: numpy.ndarray) -> Batch:
        rows = torch.from_numpy(self._tokens[indices].astype(numpy.int64))
        mask = torch.from_numpy(self._loss_mask[indices])[:, 1:]
        targets = rows[:, 1:].masked_fill(mask == 0, IGNORE_INDEX)
        return Batch(rows[:, :-1].contiguous(), targets)


class FeatureSplit(Split):
    """Rows of features with a class each; features kept as bytes 0..255 are given as 0..1."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs, self._targets = inputs, targets

    def __len__(self) -> int:
        return len(self._targets)

    def _gather(self, indices: numpy.ndarray) -> Batch:
        rows = torch.from_numpy(indices)
        inputs = self._inputs[rows]
        inputs = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()
        return Batch(inputs, self._targets[rows].long())


def open_split(prepared: Prepared, name: Literal["train", "eval"], *, verify: bool) -> Split:
    """One split of the data, memory-mapped; `verify` reads the whole file once to check its hash.

    Raises DataError if the file is missing, is not the one that was prepared, or does not hold what
    it should.
    """
    try:
        if verify:
            actual = file_hash(Path(prepared.path))
            if actual != prepared.sha256:
                raise DataError(
                    f"{prepared.path} is not the file that was prepared: its sha256 is {actual}, "
                    f"expected {prepared.sha256}; delete it so that it is prepared anew"
                )
        with safe_open(prepared.path, framework="pt") as file:
            if prepared.kind == "tokens":
                tokens = _integers(file.get_tensor(name), f"{name} tokens", prepared.path)
            if prepared.masked:
                split: Split = MaskedSplit(tokens, file.get_tensor(f"{name}_learn"))
            elif prepared.kind == "tokens":
                split = TokenSplit(tokens, prepared.sequence_length or 1)
            else:
                targets = file.get_tensor(f"{name}_targets")
                split = FeatureSplit(
                    file.get_tensor(f"{name}_inputs"),
                    _integers(targets, f"{name} targets", prepared.path),
                )
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the prepared data {prepared.path}: {error}") from None
    expected = prepared.train_size if name == "train" else prepared.eval_size
    if len(split) != expected:
        raise DataError(f"{prepared.path} holds {len(split)} {name} samples, expected {expected}")
    return split


def _integers(tensor: Tensor, what: str, path: str) -> Tensor:
    """The tensor; DataError if making integers of its numbers would change them."""
    if tensor.is_floating_point() or tensor.is_complex():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise DataError(f"{path}: the {what} are {kind}; they must be integers 0, 1, ...")
    return tensor
