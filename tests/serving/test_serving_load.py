"""How fast and how steady: time to first token (S7), overload (S5), one disconnect (S4).

They measure, so they are long tests, for a machine with nothing else to do.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest

from smolrun.serving.frontend import Frontend
from tests.serving.fake_engine import FakeEngine
from tests.serving.load_client import CHAT, PATH, measured
from tests.serving.server import says, served
from tests.waiting import until

pytestmark = pytest.mark.soak


def test_http_takes_less_than_5_ms_of_the_time_to_first_token(tmp_path: Path):
    """For a prompt of one token, and an engine that takes no time."""
    with served(FakeEngine(says("x")), tmp_path) as server:
        times = measured("first_token", server.url, 300)[50:]
        print(f"median {statistics.median(times):.2f} ms, best {min(times):.2f} ms")
        assert statistics.median(times) <= 5.0


def test_overload_keeps_the_goodput_and_is_refused_at_once(tmp_path: Path):
    engine = FakeEngine(says("x" * 20), step_s=0.01, slots=4)
    engine.frontend = Frontend(engine.send, max_waiting=4)
    with served(engine, tmp_path) as server:
        peak = measured("load", server.url, 8, 8.0)
        over = measured("load", server.url, 32, 8.0)
        refused = over["refused_ms"]
        late = refused[int(0.95 * len(refused))]
        print(f"peak {peak['rate']:.1f}/s, at 4x {over['rate']:.1f}/s")
        print(f"{len(refused)} refused, {statistics.median(refused):.1f} ms, 95 %: {late:.1f} ms")
        assert over["rate"] >= 0.95 * peak["rate"]
        assert late <= 50
        until(server.is_at_rest)


def test_a_client_that_leaves_is_cancelled_within_a_quarter_of_a_second(tmp_path: Path):
    times = []
    with served(FakeEngine(says("x" * 400), step_s=0.01), tmp_path) as server:
        for stream in [True, False] * 10:
            body = json.dumps(CHAT | {"stream": stream}).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            count = len(server.engine.submitted)
            with server.connected() as connection:
                connection.sendall(head.encode() + body)
                until(lambda count=count: len(server.engine.submitted) > count)  # type: ignore[misc]
            begun = time.monotonic()
            until(server.is_at_rest)
            times.append(time.monotonic() - begun)
        print(f"slowest {1000 * max(times):.0f} ms")
        assert max(times) <= 0.25
