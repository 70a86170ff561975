"""model=hf: transformers' own numbers, equal on every rank, from a folder and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from smolrun.errors import ConfigError
from smolrun.models.huggingface import build, prepare
from smolrun.models.huggingface_network import HuggingFaceNetwork
from smolrun.models.initialise import build_model, build_shell, first_value
from tests.models.model_folders import FAMILIES, SMALL, change_config, save_model
from tests.models.tiny import Spec

KEYS: dict[str, Any] = {"pretrained": True, "revision": None, "attention": "auto", "dropout": 0.0}
TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


LAYERS = {"gpt2": "n_layer"}


def make(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **keys: Any
) -> HuggingFaceNetwork:
    model = build_model(
        lambda: build(Spec(model_folder=str(folder)), **{**KEYS, **keys}),
        seed,
        dtype=dtype,
        device="cpu",
    )
    assert isinstance(model, HuggingFaceNetwork)
    return model


def theirs(folder: Path, **keys: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **keys)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a worker opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("no_network")
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path, family)
    with torch.no_grad():
        expected = theirs(folder)(TOKENS).logits
        assert expected.abs().max() > 0.5
        assert torch.equal(make(folder)(TOKENS), expected)
        eager = make(folder, attention="eager")
        assert eager.network.config._attn_implementation == "eager"
        assert (eager(TOKENS) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_positions_exact(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path, family)
    expected = theirs(folder, dtype=torch.bfloat16)(TOKENS).logits
    model = make(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(TOKENS), expected)


def test_weights_kept_in_half_precision_are_widened_exactly(tmp_path: Path) -> None:
    folder = save_model(tmp_path, dtype=torch.bfloat16)
    expected = theirs(folder, dtype=torch.float32)(TOKENS).logits
    assert torch.equal(make(folder)(TOKENS), expected)


def test_random_weights_come_from_the_seed(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    models = [make(folder, seed, pretrained=False).state_dict() for seed in (3, 3, 4)]
    name = "network.model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not torch.equal(models[0][name], models[2][name])
    assert not torch.equal(models[0][name], make(folder).state_dict()[name])


def test_a_shape_alone_needs_no_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (folder / "model.safetensors").unlink()
    found = prepare(tmp_path, lambda *_: None, str(folder), **{**KEYS, "pretrained": False})
    assert found.tokenizer_folder is None
    assert make(folder, pretrained=False)(TOKENS).shape == (2, 40, 61)
    with torch.device("meta"):
        model = build(Spec(model_folder=str(folder)), **{**KEYS, "pretrained": False})
    assert all(parameter.is_meta for parameter in model.parameters())


def test_shared_weights_are_one_parameter_in_every_precision(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = make(folder, dtype=dtype)
        names = [name for name, _ in model.named_parameters()]
        assert names == [name for name, _ in make(folder).named_parameters()]
        assert not any("lm_head" in name for name in names)
        assert model.network.lm_head.weight is model.network.model.embed_tokens.weight


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_blocks_changes_no_gradient(tmp_path: Path, family: str) -> None:
    model = make(save_model(tmp_path, family))
    runs = []
    block = next(m for m in model.modules() if type(m).__name__.endswith("MLP"))
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients(model)
    assert len(runs) == 1
    model.recompute = True
    assert model.recompute
    runs.clear()
    again = gradients(model)
    assert len(runs) == 2  # once forward, once more for backward
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    model.recompute = False
    assert not model.recompute


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gpt2")  # whose own rate is 0.1
    model = make(folder)
    assert model.training
    assert torch.equal(model(TOKENS), model(TOKENS))
    lively = make(folder, dropout=0.3)
    assert not torch.equal(lively(TOKENS), lively(TOKENS))
    lively.eval()
    assert torch.equal(lively(TOKENS), model(TOKENS))


def test_a_padded_vocabulary_is_fine_and_a_small_one_is_not(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    spec = Spec(num_outputs=50, model_folder=str(folder))
    assert build(spec, **KEYS)(TOKENS % 50).shape[-1] == 61
    with pytest.raises(ConfigError, match=r"tokenizer has 62 tokens.*knows 61"):
        build(Spec(num_outputs=62, model_folder=str(folder)), **KEYS)


def test_sequences_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        folder = save_model(tmp_path / family, family)
        with pytest.raises(ConfigError, match=r"sequence_length=65 is more than .*64 tokens"):
            build(Spec(sequence_length=65, model_folder=str(folder)), **KEYS)


def test_features_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    with pytest.raises(ConfigError, match="reads tokens"):
        build(Spec(sequence_length=None, num_inputs=4, model_folder=str(folder)), **KEYS)


def lacking(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)


def of_another_width(folder: Path) -> None:
    change_config(folder, intermediate_size=48)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lacking, r"lack model\.layers\.2\."), (of_another_width, "cannot build|another shape")],
)
def test_weights_that_are_not_the_models_are_refused(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = save_model(tmp_path)
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        make(folder)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
# In a process of its own: the hub's client reads its settings when it is imported.
FETCH = """
import json, sys
from pathlib import Path
from smolrun.errors import ConfigError
from smolrun.models import huggingface
told = []
keys = {"pretrained": True, "revision": None, "attention": "auto", "dropout": 0.0}
try:
    found = huggingface.prepare(Path(), lambda *a: told.append(a), sys.argv[1], **keys)
    commit = huggingface.pinned_revision(sys.argv[1], None)
    print(json.dumps({"folder": found.folder, "told": told[-1:], "commit": commit}))
except ConfigError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for; serves the folder `files`."""

    files: Path
    tokens: list[str | None]

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.files.iterdir())
        if path.startswith("/api/models/me/gated"):
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/me/small/tree"):
            entries = [self._entry(name) for name in names]
            return self._send(200, json.dumps(entries).encode())
        if path.startswith("/api/models/me/small"):
            listed = [{"rfilename": name} for name in names]
            body = {"id": "me/small", "sha": COMMIT, "siblings": listed}
            return self._send(200, json.dumps(body).encode())
        name = path.rpartition("/")[2]
        if path.startswith("/me/small/resolve/") and name in names:
            content = (self.files / name).read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _entry(self, name: str) -> dict[str, Any]:
        size = (self.files / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": "0" * 40}

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    folder = save_model(tmp_path / "served")
    (folder / "code.py").write_text("raise SystemExit('never run')")
    handler = type("Served", (Hub,), {"files": folder, "tokens": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(tmp_path: Path, port: int, name: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", FETCH, name],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_a_model_is_fetched_once_and_stays_without_the_hub(
    tmp_path: Path, hub: ThreadingHTTPServer
) -> None:
    port = hub.server_address[1]
    told = fetch(tmp_path, port, "me/small")
    folder = Path(told["folder"])
    served = tmp_path / "served"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in served.iterdir()} - {"code.py"}
    assert (folder / "model.safetensors").read_bytes() == (
        served / "model.safetensors"
    ).read_bytes()
    assert told["told"][0][0] == "fetching me/small"
    hub.shutdown()
    hub.server_close()
    again = fetch(tmp_path, port, "me/small")
    assert again["folder"] == str(folder)
    assert told["commit"] == again["commit"] == COMMIT, "known without the hub too"
    assert "the hub cannot be reached" in fetch(tmp_path, port, "me/other")["error"]


def test_refusals_of_the_hub_are_sentences(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    port = hub.server_address[1]
    assert "`hf auth login`" in fetch(tmp_path, port, "me/gated")["error"]
    assert "the hub has no such model" in fetch(tmp_path, port, "me/none")["error"]
    assert "neither a folder nor a name" in fetch(tmp_path, port, "not a name")["error"]
    weights = tmp_path / "served" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "in pytorch_model.bin only" in fetch(tmp_path, port, "me/small")["error"]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_a_shell_compute_what_the_whole_model_does(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path, family, **{LAYERS.get(family, "num_hidden_layers"): 3})
    whole = make(folder)
    hidden, held = TOKENS, []
    for layers, ends in (
        (range(1), (True, False)),
        (range(1, 2), (False,) * 2),
        (range(2, 3), (False, True)),
    ):
        stage = shell(folder)
        stage.keep_stage(layers, *ends)
        for name, parameter in stage.named_parameters():
            parameter.data = first_value(stage, name, parameter, seed=0)
            assert torch.equal(parameter, whole.get_parameter(name))
        held.append({name for name, _ in stage.named_parameters()})
        hidden = stage(hidden)
    assert torch.equal(hidden, whole(TOKENS))
    assert set.union(*held) == {name for name, _ in whole.named_parameters()}
    shared = {whole.tied_parameter} - {None}
    assert held[0] & held[2] == shared and not held[1] & (held[0] | held[2])


def test_weights_of_a_shell_that_are_missing_or_misshapen_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    model = shell(folder)
    change_config(folder, intermediate_size=48)
    wider = shell(folder)
    name = "network.model.layers.0.mlp.up_proj.weight"
    assert first_value(model, name, model.get_parameter(name), seed=0).shape == (40, 32)
    with pytest.raises(ConfigError, match=r"another shape for model.layers.0.mlp.up_proj.weight"):
        first_value(wider, name, wider.get_parameter(name), seed=0)
    with pytest.raises(ConfigError, match=r"lack more.weight"):
        first_value(model, "network.more.weight", model.get_parameter(name), seed=0)


def test_a_family_that_does_more_between_layers_is_not_cut(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("gpt_neox", **SMALL)
    model = HuggingFaceNetwork(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(ConfigError, match=r"family gpt_neox cannot be cut.*gpt2, llama.*fsdp"):
        assert model.shape


def shell(folder: Path) -> HuggingFaceNetwork:
    """A model without values."""
    build_it = lambda: build(Spec(model_folder=str(folder)), **KEYS)  # noqa: E731
    model = build_shell(build_it, 0, dtype=torch.float32, device="cpu")
    assert isinstance(model, HuggingFaceNetwork)
    return model
