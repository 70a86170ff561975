"""Clients that measure, as a process of their own, so that they do not share the server's
interpreter: `python -m tests.serving.load_client first_token|load URL ...` prints JSON."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from typing import Any

import httpx

CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "H"}]}
PATH = "/v1/chat/completions"
_PAUSE_S = 0.4  # after a refusal, at most; not all clients at the same moment


def measured(*arguments: object) -> Any:
    """What such a process prints."""
    command = [sys.executable, "-m", "tests.serving.load_client", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def first_token(url: str, count: int) -> list[float]:
    """Milliseconds from each of `count` requests to its first token, over one connection."""
    times = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(count):
            begun = time.perf_counter()
            with client.stream("POST", PATH, json=CHAT | {"stream": True}) as answer:
                lines = answer.iter_lines()
                assert any('"content":"x"' in line for line in lines)
                times.append(1000 * (time.perf_counter() - begun))
                assert list(lines)[-2:] == ["data: [DONE]", ""]
    return times


async def load(url: str, clients: int, seconds: float) -> dict[str, Any]:
    """`clients` ask again and again, as fast as they are answered. Answers a second, and the
    milliseconds of each refusal."""
    done, refused, end = 0, list[float](), time.monotonic() + seconds

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal done
        while time.monotonic() < end:
            begun = time.monotonic()
            answer = await http.post(PATH, json=CHAT)
            if answer.status_code == 200:
                done += 1
            else:
                assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
                refused.append(1000 * (time.monotonic() - begun))
                await asyncio.sleep(random.random() * _PAUSE_S)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return {"rate": done / seconds, "refused_ms": sorted(refused)}


if __name__ == "__main__":
    what, url, *numbers = sys.argv[1:]
    if what == "first_token":
        print(json.dumps(first_token(url, int(numbers[0]))))
    else:
        print(json.dumps(asyncio.run(load(url, int(numbers[0]), float(numbers[1])))))
