"""Every algorithm once on hosts that are apart, through SSH and over links of 200 Mbit/s."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.algorithms.worlds import CONF
from tests.hosts.lab import Lab
from tests.hosts.runs import SMALL, Driver, assert_clean

ALGORITHMS = sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml"))
pytestmark = [pytest.mark.hosts, pytest.mark.soak, pytest.mark.timeout(150)]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path)
    yield the_driver
    the_driver.end()


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "single"])
def test_it_trains_and_leaves_what_it_promises(driver: Driver, algorithm: str) -> None:
    code, out, err = driver.run(*SMALL, f"algorithm={algorithm}")
    assert code == 0, out + err
    losses = [row["loss"] for row in driver.rows("step")]
    assert len(losses) == 20
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    saved = driver.latest / "checkpoints" / "step-00000020" / "manifest.json"
    assert json.loads(saved.read_text())["step"] == 20
    assert {row["rank"] for row in driver.rows("rank_step")} == {0, 1, 2}
    assert_clean(driver.lab.hosts)
