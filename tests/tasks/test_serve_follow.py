"""serving.follow=run as a user runs it: checkpoints come while real processes answer."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import httpx
import pytest

from tests.serving.followed_run import add_checkpoint, make_run
from tests.tasks.served import START_S, events, serving
from tests.waiting import until

pytestmark = pytest.mark.timeout(240)


def steps_of(url: str) -> dict[int, int]:
    """The step that each replica answers with."""
    found = httpx.get(f"{url}/cluster", timeout=60).json()["replicas"]
    return {one["rank"]: one["step"] for one in found if one["takes_requests"]}


def test_a_server_takes_up_newer_checkpoints_while_it_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outputs" / "20260101-000000-mine-abcd")
    add_checkpoint(run, 1)
    keys = [f"model.run={run.name}", "serving.follow=run", "serving=replicas", "cluster.ranks=2"]
    asked = {"prompt": "Once", "temperature": 0, "max_tokens": 900, "ignore_eos": True}
    with serving(tmp_path, *keys, "serving.port=0", "cluster.threads=1") as server:
        until(lambda: steps_of(server.url) == {0: 1, 1: 1}, START_S)
        place = f"{server.url}/v1/completions"

        def answer(**more: object) -> httpx.Response:
            body = {"model": run.name, **asked, **more}
            found = httpx.post(place, json=body, timeout=START_S)
            assert found.status_code == 200, found.text
            return found

        first = answer(worker_rank=0)
        assert first.headers["x-smolrun-step"] == "1"
        body = {"model": run.name, **asked, "stream": True, "worker_rank": 0}
        with httpx.stream("POST", place, json=body, timeout=START_S) as response:
            got = events(response.iter_lines())
            begun = [next(got)]
            add_checkpoint(run, 2)
            until(lambda: steps_of(server.url) == {0: 2, 1: 2}, START_S)
            begun += got
        text = "".join(choice["text"] for one in begun for choice in one["choices"])
        assert text == first.json()["choices"][0]["text"]
        assert {one["system_fingerprint"] for one in begun} == {"step-1"}
        second = [answer(worker_rank=rank) for rank in (0, 1)]
        texts = {one.json()["choices"][0]["text"] for one in second}
        assert len(texts) == 1 and text not in texts
        assert [one.json()["system_fingerprint"] for one in second] == ["step-2"] * 2
        damaged = next(add_checkpoint(run, 3).glob("*.safetensors"))
        damaged.write_bytes(b"0" + damaged.read_bytes()[1:])
        shutil.rmtree(run / "checkpoints" / "step-00000001")
        shutil.rmtree(run / "checkpoints" / "step-00000002")  # the server has its own link
        server.worker(1).kill()
        until(lambda: steps_of(server.url) == {0: 2}, START_S)
        until(lambda: steps_of(server.url) == {0: 2, 1: 2}, START_S)
        assert answer(worker_rank=1).json()["choices"][0]["text"] in texts
        server.driver.send_signal(signal.SIGTERM)
        code, out, err = server.end()
        assert (code, err) == (130, "")
        assert "rank 1 on local answers requests, with step 2" in out
        assert not list((server.run / "weights").iterdir())
