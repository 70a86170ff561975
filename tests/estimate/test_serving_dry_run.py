"""What a dry run of a server takes for the speed of each rank."""

from __future__ import annotations

from smolrun.cli.compose import compose
from smolrun.estimate.serving_dry_run import _ranks
from smolrun.models.shape import ModelBytes

MODEL = ModelBytes(10, 1000, 500, 500, 0, 1)


def test_hosts_are_as_fast_as_they_are_given_or_emulate() -> None:
    hosts = [
        "{name: here, address: 10.0.0.1}",
        "{name: slow, address: 10.0.0.1, speed: 0.5, emulate: {compute: 0.25}}",
        "{name: mini, ssh: mini, speed: 2}",
    ]
    config = compose(["task=serve", f"cluster.hosts=[{', '.join(hosts)}]"])
    found = _ranks(config, MODEL, layer_s=0.001)
    assert [rank.layer_s for rank in found] == [0.001, 0.004, 0.0005]
    assert [rank.head_s for rank in found] == [0.0005, 0.002, 0.00025]
