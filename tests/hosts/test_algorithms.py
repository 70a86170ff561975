"""Every algorithm once on hosts that are apart, through SSH and over links of 200 Mbit/s."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.algorithms.worlds import CONF
from tests.hosts.conftest import Maker
from tests.hosts.lab import Lab
from tests.hosts.runs import SMALL, Driver, assert_clean

ALGORITHMS = sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml"))
pytestmark = [pytest.mark.hosts, pytest.mark.soak, pytest.mark.timeout(150)]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path)
    yield the_driver
    the_driver.end()


# Three layers, one for each host: an mlp cannot be cut.
STAGES = ["model=gpt_tiny", "data.max_mb=1", "data.sequence_length=64", "training.sample_tokens=0"]


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "single"])
def test_it_trains_and_leaves_what_it_promises(driver: Driver, algorithm: str) -> None:
    cut = [*STAGES, *SMALL[2:]]
    models = {"mp": cut, "mp_pipeline": cut, "ep": ["model=moe_tiny", *cut[1:]]}
    model = models.get(algorithm, SMALL)
    code, out, err = driver.run(*model, f"algorithm={algorithm}")
    assert code == 0, out + err
    losses = [row["loss"] for row in driver.rows("step")]
    assert len(losses) == 20
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    saved = driver.latest / "checkpoints" / "step-00000020" / "manifest.json"
    assert json.loads(saved.read_text())["step"] == 20
    assert {row["rank"] for row in driver.rows("rank_step")} == {0, 1, 2}
    assert_clean(driver.lab.hosts)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_stages_over_links_of_25_mbit_train_and_the_network_is_named(
    make_lab: Maker, tmp_path: Path, quantization: str
) -> None:
    driver = Driver(make_lab(hosts=3, rate="25mbit"), tmp_path)
    keys = ["algorithm=mp_pipeline", "training.steps=20", "training.global_batch_size=24"]
    try:
        code, out, err = driver.run(*STAGES, *keys, f"quantization={quantization}", timeout_s=140)
    finally:
        driver.end()
    assert code == 0, out + err
    steps, shares = driver.rows("step"), driver.summary["time"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    # Two neighbours send to the middle host over its one cable: 24 x 64 hidden states, and as many
    # gradients, of 128 numbers.
    received = 2 * 24 * 64 * 128 * {"none": 4, "int8": 1}[quantization]
    least_s = received * 8 / 25e6
    took_s = (steps[-1]["time_s"] - steps[0]["time_s"]) / 19
    print(f"{quantization}: {took_s:.3f} s a step, the cable alone {least_s:.3f} s, {shares}")
    print([line for line in out.splitlines() if "where the time went" in line])
    assert took_s > least_s
    if quantization == "none":
        assert shares["network"] > max(
            shares["computing"], shares["waiting_for_slower_ranks"], shares["pipeline_bubble"]
        )
        assert shares["advice"] == "try quantization=int8"
