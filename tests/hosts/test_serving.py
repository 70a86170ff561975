"""A model cut over hosts that are apart, over real SSH: each gets its own layers, and once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.hosts.lab import Lab
from tests.hosts.runs import Driver
from tests.tasks.served import model_in

pytestmark = [pytest.mark.hosts, pytest.mark.soak]


@pytest.mark.timeout(300)
def test_hosts_get_their_layers_once_and_answer_as_one(lab3: Lab, tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    driver = Driver(lab3, tmp_path / "home")
    asked = ["task=generate", "model=hf", f"model.name={model}", "prompt=Hello"]
    asked += ["serving.temperature=0", "serving.max_tokens=16", "cluster.threads=1"]

    def generate(*overrides: str, cluster: str = "lab") -> tuple[str, int]:
        """The answer, and the bytes of weights that were sent for it."""
        code, out, err = driver.run(*asked, *overrides, cluster=cluster)
        assert code == 0, err
        sent = re.search(r"([\d,]+) bytes of weights sent", err)
        return out, int(sent[1].replace(",", "")) if sent else 0

    try:
        alone, nothing = generate(cluster="local")
        cut = ["serving=pipeline", "serving.layers=[[0,0],[1,2],[3,3]]"]
        first, sent = generate(*cut)
        again, sent_again = generate(*cut)
        other, sent_for_another = generate("serving=pipeline", "serving.layers=[[0,1],[2,2],[3,3]]")
    finally:
        driver.end()
    assert first == again == other == alone
    layer = 4 * sum(part for part in (32 * 32 * 2, 32 * 16 * 2, 3 * 32 * 40, 2 * 32))
    assert nothing == sent_again == 0
    # The embedding twice: the last stage has the head, and both are one matrix or two of that size.
    assert 4 * layer < sent < 4 * layer + 4 * 3 * 258 * 32 + 6 * 4096
    assert layer <= sent_for_another < layer + 4096  # layer 1, for the first host
