"""Decoding over stages beside one process, transformers' generate and llama.cpp: tokens per second
of engines on rank 0, without HTTP. Each row alternates the two sides.

The model has the shape of SmolLM2-135M and weights of random size 0.02: time does not depend on
values.
"""

from __future__ import annotations

import functools
import logging
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smolrun.benchmarks import llama_cpp
from smolrun.benchmarks.compare import compare
from smolrun.errors import ConfigError
from smolrun.mesh.mesh import Mesh
from smolrun.models.sampling import Sampling
from smolrun.models.shape import DecoderShape, completed_shape, parameter_shapes
from smolrun.parts.placement import cut
from smolrun.serving.engine import Engine
from smolrun.serving.messages import FromEngine, ServingDtype, StageStats, StepOutput, Submit
from smolrun.serving.pipeline import PipelineHead, run_stage
from smolrun.serving.scheduler import Scheduler
from smolrun.serving.stage import Stage
from smolrun.serving.stage_runner import DecoderRunner, StageTimes
from smolrun.serving.weight_types import quantized, stored_as
from smolrun.serving.weights import COMPUTE_DTYPES

_log = logging.getLogger(__name__)
_VOCAB = 49152
_STAGE = StageStats(0, "", 0, 0)  # a bench reads no figures of stages
_WEIGHT = 0.02  # the standard deviation of a fresh decoder


def smollm2_shape(layers: int) -> DecoderShape:
    """SmolLM2-135M, with so many layers."""
    return completed_shape(
        layers=layers,
        width=576,
        heads=9,
        kv_heads=3,
        head_width=None,
        ffn_width=1536,
        max_sequence_length=8192,
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
        tie_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        rope_theta=100000.0,
        rope_scaling=None,
        norm_eps=1e-5,
    )


class BenchEngine:
    """An engine on a thread of its own, over `stages` of the mesh; `decode` blocks until every
    stream has its tokens."""

    def __init__(
        self, mesh: Mesh, stages: list[int], runner: DecoderRunner, slots: int, capacity: int
    ) -> None:
        self._inbox: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        self._number = 0
        scheduler = Scheduler(
            slots=slots,
            capacity=capacity,
            vocab_size=_VOCAB,
            stages=len(stages),
            prefix_reuse=False,
        )
        self._engine = Engine(scheduler, self._inbox.put, max_message_bytes=1 << 20)
        head = PipelineHead(mesh, stages, runner, StageTimes(_STAGE), self._engine.on_result)
        self._thread = threading.Thread(
            target=self._engine.run, args=(head,), name="smolrun-bench-engine", daemon=True
        )
        self._thread.start()
        self._inbox.get()  # Ready

    def decode(self, streams: int, prompt_tokens: int, new_tokens: int) -> None:
        """Every stream generates `new_tokens` tokens."""
        names = set()
        for _ in range(streams):
            self._number += 1
            names.add(str(self._number))
            prompt = [(self._number + 7 * index) % _VOCAB for index in range(prompt_tokens)]
            greedy = Sampling(temperature=0.0)
            self._engine.submit(Submit(str(self._number), prompt, new_tokens, sampling=greedy))
        while names:
            output = self._inbox.get()
            if isinstance(output, StepOutput):
                names -= {finished.request for finished in output.finished}

    def close(self) -> None:
        """End the engine and its stages; blocks."""
        self._engine.stop()
        self._thread.join()


class HuggingFacePeer:
    """transformers' `generate` on a model of the same shape, greedy, streams as one batch."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=_VOCAB,
            hidden_size=shape.width,
            intermediate_size=shape.ffn_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.max_sequence_length,
            rms_norm_eps=shape.norm_eps,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
        )
        self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def decode(self, streams: int, prompt_tokens: int, new_tokens: int) -> None:
        """As of BenchEngine."""
        prompt = torch.arange(streams * prompt_tokens).view(streams, prompt_tokens) % _VOCAB
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    def close(self) -> None:
        """Nothing runs between calls."""


def compare_serving(
    mesh: Mesh,
    *,
    dtype: ServingDtype,
    layers: int,
    streams: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    peers: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """A row for every peer and number of streams, on rank 0; other ranks are stages meanwhile.

    Seconds are those of one token, of all streams together. A peer is "one process", the same
    engine with the whole model on rank 0, "HF generate", or "llama.cpp", which is left out where it
    is not installed."""
    slots, capacity = max(streams), prompt_tokens + new_tokens
    shape, stages = smollm2_shape(layers), list(range(mesh.world_size))
    held = _layers_of(shape, mesh.world_size)[mesh.rank]
    runner = _runner(shape, held[0], held[-1], dtype, slots, capacity)
    if mesh.rank:
        run_stage(mesh, stages, runner, StageTimes(_STAGE))
        return
    parameters = _num_parameters(shape, layers, has_ends=True)
    ours = BenchEngine(mesh, stages, runner, slots, capacity)
    for name in peers:
        if name == "llama.cpp" and not llama_cpp.is_installed():
            _log.info("llama.cpp is left out: %s is not on the PATH", llama_cpp.PROGRAM)
            continue
        peer = _peer(name, mesh, shape, dtype, slots, capacity)
        for count in streams:
            sizes = (count, prompt_tokens, new_tokens)
            tokens = count * new_tokens
            compared = compare(
                functools.partial(ours.decode, *sizes),
                functools.partial(peer.decode, *sizes),
                repeats=repeats,
                calls=1,
                meet=lambda: None,
            )
            facts = {"world_size": mesh.world_size, "dtype": dtype, "parameters": parameters}
            row = compared.row("serving", _what(count), name, **facts, streams=count)
            row |= {key: row[key] / tokens for key in ("ours_s", "peer_s")}
            yield row | {"tokens_per_s": 1 / row["ours_s"], "peer_tokens_per_s": 1 / row["peer_s"]}
        peer.close()
    ours.close()


def _peer(
    name: str, mesh: Mesh, shape: DecoderShape, dtype: ServingDtype, slots: int, capacity: int
) -> BenchEngine | HuggingFacePeer | llama_cpp.LlamaCppPeer:
    if name == "HF generate":
        return HuggingFacePeer(shape, COMPUTE_DTYPES[dtype])
    if name == "llama.cpp":
        return llama_cpp.LlamaCppPeer(shape, _VOCAB, dtype, slots, capacity)
    whole = _runner(shape, 0, shape.layers - 1, dtype, slots, capacity)
    return BenchEngine(mesh, [0], whole, slots, capacity)


def _num_parameters(shape: DecoderShape, layers: int, *, has_ends: bool) -> int:
    shapes = parameter_shapes(shape, _VOCAB, 0, layers - 1, has_ends, has_ends)
    return sum(map(math.prod, shapes.values()))


def _layers_of(shape: DecoderShape, world_size: int) -> list[range]:
    """Stages of equal time on equal ranks: for one token that is the number of weights."""
    costs = [float(_num_parameters(shape, 1, has_ends=False))] * shape.layers
    costs[-1] += _VOCAB * shape.width
    stages = cut(costs, [1.0] * world_size)
    if stages is None:
        raise ConfigError(f"bench.layers = {shape.layers}: each of {world_size} ranks needs one")
    return stages.layers


def _what(streams: int) -> str:
    return f"a token, {streams} stream{'s' if streams > 1 else ''}"


def _runner(
    shape: DecoderShape, first: int, last: int, dtype: ServingDtype, slots: int, capacity: int
) -> DecoderRunner:
    """Layers first .. last with random weights."""
    ends = (first == 0, last == shape.layers - 1)
    shapes = parameter_shapes(shape, _VOCAB, first, last, *ends)
    parameters: dict[str, Tensor] = {}
    for name, size in shapes.items():
        values = torch.empty(size).normal_(0, _WEIGHT)
        parameters |= quantized(name, values, stored_as(name, size, dtype))
    sizes: dict[str, Any] = {"slots": slots, "capacity": capacity, "dtype": COMPUTE_DTYPES[dtype]}
    stage = Stage(shape, _VOCAB, first, last, *ends, parameters, **sizes)
    return DecoderRunner(stage, slots + max(slots, 256))
