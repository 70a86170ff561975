"""Hosts whose kernels really round differently: one of them has torch without its vector units."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.hosts.lab import Lab
from tests.hosts.runs import Driver

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(150),
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no vector unit to leave out"
    ),
]
KEYS = ["model=gpt_tiny", "data.max_mb=1", "model.layers=1", "data.sequence_length=16"]
SHORT = ["training.steps=20", "checkpoint=none", "training.sample_tokens=0"]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    plain = {"lab2": {"env": {"ATEN_CPU_CAPABILITY": "default"}}}
    the_driver = Driver(lab3, tmp_path, host_keys=plain)
    yield the_driver
    the_driver.end()


@pytest.mark.soak
def test_owners_compute_there_and_replicas_stay_equal(driver: Driver) -> None:
    code, out, err = driver.run(*KEYS, *SHORT, "training.check_replicas=true")
    assert code == 0, out + err
    assert len(driver.rows("replica_hash")) == 20
    log = (driver.latest / "logs" / "rank0-lab1.log").read_text()
    assert "owner computes: True" in log
    assert "cpu DEFAULT" in log


@pytest.mark.soak
def test_otherwise_they_drift_and_are_made_equal(driver: Driver) -> None:
    """The negative control, with the very same kernels."""
    keys = ["algorithm.shard_optimizer=false", "training.resync_every=5"]
    code, out, err = driver.run(*KEYS, *SHORT, *keys)
    assert code == 0, out + err
    drifts = driver.rows("drift")
    print([row["difference"] for row in drifts])
    assert [row["step"] for row in drifts] == [4, 9, 14, 19]
    assert all(row["ranks"] == [1] and 0 < row["difference"] < 1e-3 for row in drifts)
    assert "rank 1 drifted from rank 0 by up to" in out
