"""An emulated cable beside the kernel's: the same all_reduce must take the same time."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
import torch

from smolrun.collectives.api import new_group
from smolrun.mesh.mesh import Mesh
from smolrun.mesh.shaping import Shape
from smolrun.testing import run_ranks
from tests.hosts.conftest import Maker
from tests.hosts.runs import Driver

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(200)]

SIZE = 16 * 2**20  # the kernel's bucket lets 256 kB pass at once: 1.5 % of it
REPEATS = 5


def emulated_s(world_size: int, mbps: float) -> float:
    """Rank 0's median, of ranks that are threads of this process."""

    def rank_main(mesh: Mesh) -> float:
        collectives, tensor = new_group(mesh), torch.zeros(SIZE // 4)
        times = []
        for _ in range(REPEATS):
            collectives.barrier()
            began = time.perf_counter()
            collectives.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return run_ranks(
        world_size, rank_main, kind="tcp", timeout_s=60, wrap=lambda rank: Shape(mbps, 0.0).wrap
    )[0]


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [2, 3])
def test_an_emulated_cable_is_as_fast_as_the_kernels(
    make_lab: Maker, tmp_path: Path, world_size: int
) -> None:
    driver = Driver(make_lab(hosts=world_size, rate="100mbit"), tmp_path)
    code, out, err = driver.run(
        "task=bench",
        "bench=link",
        f"bench.sizes=[{SIZE}]",
        f"bench.world_sizes=[{world_size}]",
        f"bench.repeats={REPEATS}",
        "mesh.security=insecure",
        timeout_s=150.0,
    )
    driver.end()
    assert code == 0, out + err
    kernel_s = json.loads((driver.latest / "bench.jsonl").read_text().splitlines()[-1])["ours_s"]
    ours_s = emulated_s(world_size, 100)
    print(f"{world_size} hosts: kernel {kernel_s:.3f} s, emulated {ours_s:.3f} s")
    assert ours_s == pytest.approx(kernel_s, rel=0.05)
