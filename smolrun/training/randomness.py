"""The random generators of this process, as plain JSON, so that a run can go on as if it had never
stopped: Python's, numpy's, torch's, and the accelerator's."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from smolrun.errors import CheckpointError


def random_state(device: torch.device) -> dict[str, Any]:
    """Where every generator of this process stands."""
    version, words, gauss = random.getstate()
    numbers = numpy.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            **numbers,
            "state": {**numbers["state"], "key": numbers["state"]["key"].tolist()},
        },
        "torch": _text(torch.get_rng_state()),
        "device": [device.type, _text(_device_state(device))],
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets every generator to where `random_state` saw it; the accelerator's only on its own
    kind."""
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        numbers = state["numpy"]
        words = numpy.array(numbers["state"]["key"], dtype=numpy.uint32)
        numpy.random.set_state({**numbers, "state": {**numbers["state"], "key": words}})
        torch.set_rng_state(_tensor(state["torch"]))
        kind, encoded = state["device"]
        if kind == device.type == "cuda":
            torch.cuda.set_rng_state(_tensor(encoded), device)
        elif kind == device.type == "mps":
            torch.mps.set_rng_state(_tensor(encoded))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the saved random state cannot be used: {error}") from None


def seed_everything(*words: int) -> None:
    """Seeds all generators from some numbers, such as (seed, rank, step)."""
    sequence = numpy.random.SeedSequence(words)
    first, second, third = (int(word) for word in sequence.generate_state(3))
    random.seed(first)
    numpy.random.seed(second)
    torch.manual_seed(third)


def _device_state(device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.empty(0, dtype=torch.uint8)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)
