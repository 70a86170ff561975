"""Fixtures of the model tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.models.tiny import MakeDecoder, make_tiny_decoder


@pytest.fixture
def make_decoder() -> MakeDecoder:
    """Builds a float32 decoder on the CPU: make(stage=(), seed=0, **keys)."""
    return make_tiny_decoder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread, and results do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
