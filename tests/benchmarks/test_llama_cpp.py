"""The peer llama.cpp gets a model of our shape and is asked for exactly as many tokens, against a
small server that stands in for llama-server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from smolrun.benchmarks.llama_cpp import LlamaCppPeer
from smolrun.benchmarks.serving import smollm2_shape
from smolrun.errors import SmolrunError
from smolrun.serving.messages import ServingDtype

_SERVER = """#!{python}
import http.server, json, shutil, sys
shutil.copy(sys.argv[sys.argv.index("--model") + 1], "{folder}/model.gguf")
json.dump(sys.argv[1:], open("{folder}/command.json", "w"))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"status": "ok"}})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        json.dump(request, open("{folder}/request.json", "w"))
        answers = [{{"tokens_predicted": {tokens}}} for _ in request["prompt"]]
        self.answer(answers if len(answers) > 1 else answers[0])

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(f"server is listening on http://127.0.0.1:{{server.server_port}}", flush=True)
server.serve_forever()
"""


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "llama-server"
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")
@pytest.mark.parametrize(
    ("dtype", "kind", "num_bytes"),
    [
        ("float32", "F32", 4),
        ("bf16", "BF16", 2),
        ("int8", "Q8_0", 34 / 32),
        ("int4", "Q4_0", 18 / 32),
    ],
)
def test_the_server_gets_our_shape_and_is_asked_for_our_tokens(
    dtype: ServingDtype,
    kind: str,
    num_bytes: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = _SERVER.format(python=sys.executable, folder=tmp_path, tokens=5)
    _install(tmp_path, monkeypatch, text)
    peer = LlamaCppPeer(smollm2_shape(2), 300, dtype, slots=3, capacity=20)
    try:
        peer.decode(3, 4, 5)
        with pytest.raises(SmolrunError, match=r"generated \[5\] tokens, not 6 each"):
            peer.decode(1, 4, 6)
    finally:
        peer.close()
    command = json.loads((tmp_path / "command.json").read_text())
    assert command[command.index("--threads") + 1] == str(torch.get_num_threads())
    request = json.loads((tmp_path / "request.json").read_text())
    assert [len(prompt) for prompt in request["prompt"]] == [4]
    assert request["n_predict"] == 6 and request["ignore_eos"] and not request["cache_prompt"]
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 2 + 2 * 9  # tied: no head
    matrix = tensors["blk.1.attn_k.weight"]
    assert matrix.shape.tolist() == [576, 192]
    assert matrix.tensor_type == GGMLQuantizationType[kind]
    assert tensors["blk.1.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32
    assert matrix.n_bytes == 576 * 192 * num_bytes


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")
def test_a_server_that_ends_is_reported_with_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, monkeypatch, f"#!{sys.executable}\nprint('no room')\n")
    with pytest.raises(SmolrunError, match="did not start; its last line: no room"):
        LlamaCppPeer(smollm2_shape(1), 300, "float32", slots=1, capacity=8)
