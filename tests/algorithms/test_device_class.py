"""Device classes are told apart, and every rank learns those of all."""

from __future__ import annotations

import platform

import pytest
import torch

from smolrun.algorithms.classicdp import device_class, gather_classes
from smolrun.collectives.api import new_group
from smolrun.testing import run_ranks


def test_whatever_rounds_differently_is_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    found = [device_class(cpu), device_class(torch.device("mps"))]
    assert torch.__version__ in found[0]
    for owner, name, value in (
        (platform, "system", lambda: "Darwin"),
        (platform, "machine", lambda: "arm64"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        (torch, "__version__", "2.99"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            found.append(device_class(cpu))
    assert len(set(found)) == len(found) == 6


def test_every_rank_learns_the_classes_of_all() -> None:
    def rank_main(mesh: object) -> list[str]:
        collectives = new_group(mesh)  # type: ignore[arg-type]
        return gather_classes(collectives, f"{'x' * 300 if collectives.index == 1 else 'Linux a'}")

    for found in run_ranks(3, rank_main):
        assert found == ["Linux a", "x" * 160, "Linux a"]
