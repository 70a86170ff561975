"""llama.cpp as a peer of the serving bench: its server, where one is on the PATH, with random
weights of the same shape in the same dtype.

One request carries all streams and is answered as a whole, so HTTP over loopback costs about a
millisecond a measurement. Source of the file's keys: the GGUF specification of ggml.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smolrun.errors import SmolrunError
from smolrun.models.shape import DecoderShape, parameter_shapes
from smolrun.serving.messages import ServingDtype
from smolrun.serving.weight_types import stored_as

if TYPE_CHECKING:
    from gguf import GGUFWriter

PROGRAM = "llama-server"
_START_S = 120.0
_ANSWER_S = 600.0
_TYPES: dict[ServingDtype, str] = {
    "float32": "F32",
    "bf16": "BF16",
    "int8": "Q8_0",
    "int4": "Q4_0",
}
_NAMES = {
    "token_embedding": "token_embd",
    "norm": "output_norm",
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}


def is_installed() -> bool:
    """Whether its server is on the PATH."""
    return shutil.which(PROGRAM) is not None


class LlamaCppPeer:
    """`llama-server` with as many threads as torch has here; `decode` as of BenchEngine."""

    def __init__(
        self, shape: DecoderShape, vocab_size: int, dtype: ServingDtype, slots: int, capacity: int
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="smolrun-llama-cpp-")
        self._log = Path(self._folder.name) / "log"
        model = Path(self._folder.name) / "model.gguf"
        _write_gguf(model, shape, vocab_size, dtype)
        self._vocab_size = vocab_size
        threads = str(torch.get_num_threads())
        command = [shutil.which(PROGRAM) or PROGRAM, "--model", str(model), "--host", "127.0.0.1"]
        command += ["--port", "0", "--threads", threads, "--threads-batch", threads]
        # --ctx-size is that of all slots together; rounded up, as the server pads each.
        command += ["--parallel", str(slots), "--ctx-size", str(slots * -(-capacity // 256) * 256)]
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(  # noqa: S603  (found on the PATH, no shell)
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._url = self._wait_ready()
        except BaseException:
            self.close()
            raise

    def decode(self, streams: int, prompt_tokens: int, new_tokens: int) -> None:
        """Every stream generates `new_tokens` tokens; one request has all of them."""
        import httpx

        prompts = [
            [(stream + 7 * index) % self._vocab_size for index in range(prompt_tokens)]
            for stream in range(streams)
        ]
        request = {"prompt": prompts, "n_predict": new_tokens, "temperature": 0.0}
        request |= {"ignore_eos": True, "cache_prompt": False}
        answer = httpx.post(f"{self._url}/completion", json=request, timeout=_ANSWER_S)
        answer.raise_for_status()
        answers = answer.json() if streams > 1 else [answer.json()]
        counts = [one["tokens_predicted"] for one in answers]
        if counts != [new_tokens] * streams:
            raise SmolrunError(f"{PROGRAM} generated {counts} tokens, not {new_tokens} each")

    def close(self) -> None:
        """End the server and remove its model."""
        self._server.terminate()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._folder.cleanup()

    def _wait_ready(self) -> str:
        """Its address, once it has loaded the model."""
        import httpx

        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._server.poll() is None:
            found = re.search(
                r"listening on (http://[\w.:]+)", self._log.read_text("utf-8", "replace")
            )
            if found and httpx.get(f"{found[1]}/health", timeout=10).status_code == 200:
                return found[1]
            time.sleep(0.1)
        lines = self._log.read_text("utf-8", "replace").strip().splitlines() or ["nothing"]
        raise SmolrunError(f"{PROGRAM} did not start; its last line: {lines[-1]}")


def _write_gguf(path: Path, shape: DecoderShape, vocab_size: int, dtype: ServingDtype) -> None:
    """Random weights, and a vocabulary of numbers: prompts are token ids."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    _add_keys(writer, shape, vocab_size)
    shapes = parameter_shapes(shape, vocab_size, 0, shape.layers - 1, True, True)
    for name, size in shapes.items():
        kind = _TYPES[stored_as(name, size, dtype)]
        _add(writer, _gguf_name(name), torch.empty(size).normal_(0, 0.02), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_keys(writer: GGUFWriter, shape: DecoderShape, vocab_size: int) -> None:
    from gguf import TokenType

    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.max_sequence_length)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{number}" for number in range(vocab_size)])
    writer.add_token_types([TokenType.NORMAL] * vocab_size)
    writer.add_token_merges(["t 0"])


def _add(writer: GGUFWriter, name: str, values: Tensor, kind: str) -> None:
    """A matrix in a type of llama.cpp; norms are float32 in every file."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if values.ndim == 1:
        writer.add_tensor(name, values.numpy())
        return
    packed = GGMLQuantizationType[kind]
    writer.add_tensor(name, quantize(values.numpy(), packed), raw_dtype=packed)


def _gguf_name(name: str) -> str:
    """blocks.3.attention.query.weight -> blk.3.attn_q.weight"""
    owner, _, kind = name.rpartition(".")
    if not owner.startswith("blocks."):
        return f"{_NAMES[owner]}.{kind}"
    _, layer, inside = owner.split(".", 2)
    return f"blk.{layer}.{_NAMES[inside]}.{kind}"
