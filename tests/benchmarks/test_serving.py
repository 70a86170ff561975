"""The bench of serving measures what it names: every peer and number of streams, on rank 0."""

from __future__ import annotations

from typing import Any

from smolrun.benchmarks.serving import compare_serving
from smolrun.mesh.mesh import Mesh
from smolrun.testing import run_ranks


def test_a_row_for_every_peer_and_number_of_streams() -> None:
    peers, streams = ["one process", "HF generate"], [1, 2]

    def work(mesh: Mesh) -> list[dict[str, Any]]:
        return list(
            compare_serving(
                mesh,
                dtype="bf16",
                layers=2,
                streams=streams,
                prompt_tokens=3,
                new_tokens=4,
                repeats=1,
                peers=peers,
            )
        )

    rows, others = run_ranks(2, work)
    assert others == []
    assert [(row["peer"], row["streams"]) for row in rows] == [
        (peer, count) for peer in peers for count in streams
    ]
    for row in rows:
        assert row["world_size"] == 2 and row["dtype"] == "bf16"
        assert 0 < row["ours_s"] < 10 and 0 < row["peer_s"] < 10
        assert row["tokens_per_s"] == 1 / row["ours_s"]
        # Embedding and two of 30 layers.
        assert 28e6 < row["parameters"] < 40e6
