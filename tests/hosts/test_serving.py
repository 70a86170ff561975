"""A model cut over hosts that are apart, over real SSH: each gets its own layers, and once; and an
answer goes on where one of them is lost."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hosts.conftest import Maker
from tests.hosts.host import Host
from tests.hosts.lab import Lab
from tests.hosts.runs import Driver, workers
from tests.tasks.served import model_in
from tests.waiting import until

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


class LabServer:
    """A server on the hosts of a lab; `said` is what it has printed so far."""

    def __init__(self, driver: Driver, *overrides: str) -> None:
        self._driver, self.said = driver, list[str]()
        keys = ["serving=pipeline", "serving.hosts=all", "serving.weights=float32"]
        keys += ["serving.port=0", "mesh.liveness=fast", *overrides]
        self.run = driver.start("task=serve", *keys)
        for stream in (self.run.stdout, self.run.stderr):
            assert stream is not None
            threading.Thread(target=self.said.extend, args=(stream,), daemon=True).start()
        until(lambda: self._summary().get("status") == "serving" or self.run.poll() is not None, 90)
        assert self.run.poll() is None, self.said
        self.url = str(self._summary()["url"])

    def _summary(self) -> dict[str, Any]:
        try:
            return self._driver.summary
        except (OSError, ValueError):
            return {}

    def answer(self, harm: Callable[[], object] = lambda: None) -> tuple[str, list[str]]:
        """The text of a long answer, and the comments in it; harm is done after 50 pieces."""
        body = {"prompt": "Hello", "max_tokens": 1500, "temperature": 1.0, "seed": 5}
        body |= {"stream": True, "ignore_eos": True}
        pieces: list[str] = []
        comments: list[str] = []
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=90) as response:
            for line in response.iter_lines():
                if line.startswith(":"):
                    comments.append(line)
                elif line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    pieces += [choice["text"] for choice in event["choices"]]
                    if len(pieces) == 50:
                        harm()
        return "".join(pieces), comments

    def until_whole(self) -> None:
        """All ranks serve."""

        def is_whole() -> bool:
            figures = httpx.get(f"{self.url}/metrics").text
            there = {*re.findall(r'smolrun_stage_tokens_total\{.*?rank="(\d)"', figures)}
            return len(there) == 3 and httpx.get(f"{self.url}/readyz").status_code == 200

        until(is_whole, 90)

    def sent(self) -> list[int]:
        """Bytes of weights, each time that they were sent."""
        found = re.findall(r"([\d,]+) bytes of weights sent", "".join(self.said))
        return [int(number.replace(",", "")) for number in found]


@pytest.mark.timeout(500)
@pytest.mark.parametrize("spare", [0, 1])
def test_an_answer_goes_on_without_a_lost_host_and_a_short_silence_loses_none(
    make_lab: Maker, tmp_path: Path, spare: int
) -> None:
    """A draw for every token, so that a wrong one changes all that follow."""
    lab = make_lab(hosts=3, rate="200mbit")
    driver = Driver(lab, tmp_path / "home")
    model = model_in(tmp_path / "model")
    try:
        server = LabServer(driver, "model=hf", f"model.name={model}", f"serving.spare={spare}")
        undisturbed, _ = server.answer()
        until(lambda: len(server.sent()) > spare)  # the copies
        two, three = lab.hosts[1:]

        def silent_for_a_second(host: Host) -> None:
            host.cut()
            threading.Timer(1.0, host.heal).start()

        faults: list[tuple[Callable[[], object], Callable[[], object]]] = [
            (lambda: two.kill(*workers(two)), bool),
            (lambda: three.kill(*workers(three)), bool),
            (two.freeze, two.thaw),
            (three.cut, three.heal),
        ]
        for harm, heal in faults:
            before = len(server.sent())
            text, comments = server.answer(harm)
            heal()
            assert text == undisturbed
            assert any(comment.startswith(": recovering") for comment in comments)
            assert not spare or server.sent()[before] == 0, "its layers were there"
            server.until_whole()
        processes = [workers(host) for host in lab.hosts]
        text, comments = server.answer(lambda: silent_for_a_second(two))
        assert text == undisturbed
        assert not any(comment.startswith(": recovering") for comment in comments)
        assert [workers(host) for host in lab.hosts] == processes
        server.run.terminate()
        server.run.wait(30)
    finally:
        driver.end()
