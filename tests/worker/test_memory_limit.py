"""What a rank may use of its host's memory: reported once a host, set where torch enforces it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smolrun.cli.compose import compose
from smolrun.config import resolved
from smolrun.events import Note
from smolrun.launch.machine_memory import MachineMemory
from smolrun.worker import memory_limit

GB = 2**30
TWO = "cluster.hosts=[{name: mini1, ranks: 2, memory_gb: 8}, {name: pi5}]"


def said(monkeypatch: pytest.MonkeyPatch, rank: int, device: str, *overrides: str) -> Any:
    """The limit in GB, the fraction that torch got, and what was reported, on a host of 16 GB."""
    fractions: list[float] = []
    notes: list[Note] = []
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: MachineMemory(16 * GB, 9 * GB, 0))
    for module in (torch.cuda, torch.mps):
        monkeypatch.setattr(module, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 24 * GB))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * GB)
    config = resolved(compose([*overrides, "algorithm=classicdp"]))
    size = sum(host["ranks"] for host in config["cluster"]["hosts"] or []) or 2
    start: Any = SimpleNamespace(config=config, rank=rank, world_size=size, host="here")
    limit = memory_limit.limit_memory(start, device, notes.append)
    return limit / GB, fractions, [note.message for note in notes]


def is_integrated(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    properties = SimpleNamespace(is_integrated=value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)


def test_of_a_cpu_the_limit_is_reported_by_the_first_rank_of_each_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit, fractions, notes = said(monkeypatch, 0, "cpu")
    assert (limit, fractions) == (12, [])
    assert notes == [
        "here: this run may use 12.0 GB of 16.0 GB of memory (memory_gb, not enforced on the CPU)"
    ]
    assert said(monkeypatch, 1, "cpu")[2] == []
    assert [said(monkeypatch, rank, "cpu", TWO)[0] for rank in range(3)] == [8, 8, 12]
    assert [len(said(monkeypatch, rank, "cpu", TWO)[2]) for rank in range(3)] == [1, 0, 1]
    assert said(monkeypatch, 0, "cpu", "cluster.memory_gb=3")[0] == 3


def test_of_mps_it_is_what_the_system_recommends_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, 0, "mps")[:2] == (10, [0.5])
    assert said(monkeypatch, 2, "mps", TWO)[:2] == (10, [1.0]), "torch's own limit is 1.7"
    assert said(monkeypatch, 1, "mps", TWO)[:2] == (8, [0.4])
    (note,) = said(monkeypatch, 0, "mps", TWO)[2]
    assert note == "here: this run may use 8.0 GB of 16.0 GB of memory (memory_gb)"


def test_of_a_gpu_with_memory_of_its_own_all_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_integrated(monkeypatch, False)
    assert said(monkeypatch, 2, "cuda", TWO) == (24, [], [])
    limit, fractions, (note,) = said(monkeypatch, 0, "cuda", TWO)
    assert (limit, fractions) == (8, [pytest.approx(4 / 24)])
    assert "8.0 GB of 24.0 GB" in note
    assert said(monkeypatch, 0, "cuda", "cluster.memory_gb=99")[:2] == (24, [0.5])


def test_of_a_gpu_in_the_machines_memory_the_machines_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_integrated(monkeypatch, True)
    assert said(monkeypatch, 2, "cuda", TWO)[:2] == (12, [0.5])
