"""Clients in JavaScript, which many programs are built on: the openai package and the AI SDK."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun.serving.access import AccessPolicy
from smolrun.serving.messages import Submit
from tests.serving.chat_model import TOOLS_TEMPLATE, chat_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, served
from tests.serving.test_clients import KEY, SAYS
from tests.waiting import until

FOLDER = Path(__file__).parent / "js_clients"


def script(submit: Submit, _: int) -> list[int]:
    """JSON where a grammar asks for it, two calls where there are tools, then an answer."""
    prompt = bytes(id for id in submit.prompt_ids if id < 256).decode()
    calls = [
        f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
        for city in ("Bonn", "Köln")
    ]
    if submit.sampling.grammar:
        said = '{"city": "Bonn", "degrees": 12}'
    elif "<tool_response>\n12 degrees" in prompt:
        said = "Bonn has 12 degrees, Köln 12 degrees."
    else:
        said = "\n".join(["I look.", *calls]) if "# Tools" in prompt else SAYS
    return [*said.encode(), 256]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    chat_model(tmp_path, TOOLS_TEMPLATE)
    engine = FakeEngine(script, step_s=0.001, max_sequence_length=4096)
    with served(engine, tmp_path, AccessPolicy(api_key=KEY)) as found:
        yield found


@pytest.mark.soak
def test_js_clients(server: Served, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("there is no node with npm on this machine")
    folder = tmp_path / "js"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("node_modules"))
    install = [npm, "ci", "--no-audit", "--no-fund"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    command = [node, "--test", "--test-reporter=tap", "clients.test.mjs"]
    env = {**os.environ, "SMOLRUN_URL": server.url}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "# fail 0" in done.stdout and "# skipped 0" in done.stdout
    until(server.is_at_rest)  # also after the streams that were left
