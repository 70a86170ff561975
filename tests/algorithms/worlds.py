"""What the equivalence tests run: two small models with data, in float64, under any algorithm and
world size."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from smolrun.algorithms.base import Algorithm, Context, EvalSums, StepResult
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import partition_keys
from smolrun.cli.compose import compose
from smolrun.data.splits import Batch
from smolrun.errors import ConfigError
from smolrun.mesh.mesh import Mesh
from smolrun.models.decoder import Decoder
from smolrun.models.shape import completed_shape
from smolrun.parts.placement import BatchPlan, plan_batches
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.replicas import parameter_hash
from smolrun.targets import keywords, load_target
from smolrun.testing import run_ranks
from smolrun.training.optimizer import make_optimizer
from tests.models.tiny import MOE, TINY

CONF = Path(__file__).parents[2] / "conf"
# edp is equal to a replay of its own log and to nothing else: test_edp.py.
EVERY = sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml") if path.stem != "edp")
# Ranks hold stages of a decoder; all other algorithms train any model.
SPLIT = [name for name in EVERY if name.startswith("mp")]
# ep trains models with experts only: test_ep.py.
ALGORITHMS = [name for name in EVERY if name not in (*SPLIT, "ep")]
GLOBAL_BATCH = 12


class TinyLanguageModel(nn.Module):
    """Embedding, a tied head, and a layer that gets no gradient: what makes gradients irregular."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 12)
        self.mix = nn.Linear(12, 12)
        self.unused = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + torch.tanh(self.mix(hidden)).cumsum(1) / tokens.shape[1]
        return self.norm(hidden) @ self.embedding.weight.T


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 31), nn.Tanh(), nn.Linear(31, 5))


_of_this_rank = threading.local()


def reseed(*words: int) -> None:
    """As seed_everything does for processes; threads would share torch's own generator."""
    _of_this_rank.generator = torch.Generator().manual_seed(abs(hash(words)))


class Noisy(TinyLanguageModel):
    """Draws random numbers while it trains; for contexts with `reseed`."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tokens)
        if not self.training:
            return logits
        return logits * torch.rand(logits.shape, generator=_of_this_rank.generator)


def decoder(
    layers: int = 3,
    *,
    tie_embeddings: bool = False,
    recompute: bool = False,
    moe: dict[str, Any] | None = None,
) -> nn.Module:
    """Of the tokens of `sample`; learned positions if it is tied, so that those are cut too."""
    learned = {"position": "learned", "norm": "layernorm", "mlp_bias": True}
    keys = {**TINY, "layers": layers, "width": 12, "heads": 2, "kv_heads": 1, "ffn_width": 16}
    keys |= {"max_sequence_length": 8, "tie_embeddings": tie_embeddings, "moe": moe}
    keys |= learned if tie_embeddings else {}
    del keys["vocab_size"]
    shape = completed_shape(**keys)
    model = Decoder(shape, 17)
    model.recompute = recompute
    return model


def experts(**keys: Any) -> nn.Module:
    """Routers whose losses weigh so much that an error of theirs is seen."""
    of_decoder = {key: keys.pop(key) for key in ("tie_embeddings", "recompute") if key in keys}
    return decoder(2, moe={**MOE, "balance_loss": 0.3, "z_loss": 0.1, **keys}, **of_decoder)


MODELS: dict[str, Callable[[], nn.Module]] = {"language_model": TinyLanguageModel, "mlp": mlp}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "decoder": decoder,
    "tied": functools.partial(decoder, tie_embeddings=True),
    "recomputed": functools.partial(decoder, recompute=True),
    "tied_recomputed": functools.partial(decoder, tie_embeddings=True, recompute=True),
    "experts": functools.partial(decoder, moe={**MOE, "balance_loss": 0.3, "z_loss": 0.1}),
    "dropping": functools.partial(experts, capacity_factor=0.7),
}


def sample(model: str, step: int) -> Batch:
    """The global batch of a step; language targets carry no loss in places, so samples weigh
    differently."""
    generator = torch.Generator().manual_seed(100 + step)
    if model == "mlp":
        inputs = torch.randn(GLOBAL_BATCH, 9, generator=generator)
        return Batch(inputs, torch.randint(5, (GLOBAL_BATCH,), generator=generator))
    tokens = torch.randint(17, (GLOBAL_BATCH, 8), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    targets[torch.arange(GLOBAL_BATCH) % 3 == 0, 3:] = -100
    return Batch(tokens, targets)


@dataclass
class Trace:
    """What one rank saw."""

    results: list[StepResult] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)  # of the replica, after every update
    pieces: list[TensorSlice] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)  # of all ranks' pieces
    eval: EvalSums | None = None
    logits: torch.Tensor | None = None

    @property
    def losses(self) -> list[float]:
        return [result.loss for result in self.results]


def context(mesh: Mesh, precision: str, optimizer: str, staleness: int) -> Context:
    keys = {"lr": 0.1, "weight_decay": 0.01} | ({"momentum": 0.9} if optimizer == "sgd" else {})
    return Context(
        mesh=mesh,
        device=torch.device("cpu"),
        precision=PRECISIONS[precision],
        make_optimizer=functools.partial(make_optimizer, name=optimizer, **keys),
        learning_rate=lambda update: 0.05 / (1 + update),
        staleness=staleness,
        grad_clip=0.5,
    )


def plan_of(
    runner: Algorithm, speeds: list[float] | None = None, micro_batch_size: int | None = 3
) -> BatchPlan:
    """How this rank walks its part of every global batch."""
    place = runner.data_coordinates(speeds or [1.0] * runner.collectives.size)
    coordinates = (place.weights, place.index, micro_batch_size, place.micro_batches)
    return plan_batches(GLOBAL_BATCH, *coordinates)


def share(batch: Batch, plan: BatchPlan, step: int) -> list[Batch]:
    """One rank's micro-batches of a global batch."""
    first = step * GLOBAL_BATCH
    parts = [slice(p.start - first, p.stop - first) for p in plan.positions(step)]
    return [Batch(batch.inputs[p], batch.targets[p], first + p.start) for p in parts]


def train(
    algorithm: str,
    model: str,
    world_size: int,
    *,
    steps: int = 10,
    staleness: int = 0,
    optimizer: str = "sgd",
    precision: str = "float64",
    micro_batch_size: int | None = 3,
    speeds: list[float] | None = None,
    kind: str = "memory",
    overrides: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> list[Trace]:
    """Trains with the keys of the algorithm's yaml; one trace per rank. `overrides` are other keys,
    `more` other fields of the context."""
    section = {
        **yaml.safe_load((CONF / "algorithm" / f"{algorithm}.yaml").read_text()),
        **(overrides or {}),
    }

    torch.manual_seed(0)  # here, because the ranks are threads and share one random generator
    start = {**MODELS, **DECODERS}[model]().to(PRECISIONS[precision].parameters)

    def rank_main(mesh: Mesh) -> Trace:
        made = dataclasses.replace(context(mesh, precision, optimizer, staleness), **(more or {}))
        runner: Algorithm = load_target(section["target"])(made, **keywords(section))
        runner.place(copy.deepcopy(start))
        return run(runner, model, plan_of(runner, speeds, micro_batch_size), steps)

    traces = run_ranks(world_size, rank_main, kind=kind)
    whole = joined([piece for trace in traces for piece in trace.pieces])
    for trace in traces:
        trace.parameters = whole
    return traces


def run(runner: Algorithm, model: str, plan: BatchPlan, steps: int) -> Trace:
    """One rank: trains, evaluates, and writes down what it sees."""
    trace = Trace()

    def note(result: StepResult) -> None:
        trace.results.append(result)
        trace.hashes.append(parameter_hash(runner.replica_tensors().values()))

    for step in range(steps):
        result = runner.train_step(share(sample(model, step), plan, step))
        if result is not None:
            note(result)
    for result in runner.drain():
        note(result)
    trace.pieces = [dataclasses.replace(s, values=s.values.clone()) for s in to_write(runner)]
    own = sample(model, 999)
    part = slice(plan.first, plan.first + sum(plan.sizes))
    if runner.evaluates_locally:
        part = slice(None)
    if runner.can_evaluate:
        trace.eval = runner.eval_step([Batch(own.inputs[part], own.targets[part])])
    if runner.can_evaluate and not own.inputs.is_floating_point():
        trace.logits = runner.logits(own.inputs)
    runner.finish()
    return trace


def to_write(runner: Algorithm) -> list[TensorSlice]:
    """What this rank writes into a checkpoint."""
    group = runner.replica_group
    return partition_keys(runner.owned(), group.size, group.index)


@functools.cache
def refusal(algorithm: str, staleness: int, optimizer: str) -> str:
    """Why the configuration refuses a combination; empty where it does not."""
    try:
        compose(
            [f"algorithm={algorithm}", f"staleness.bound={staleness}", f"optimizer={optimizer}"]
        )
    except ConfigError as error:
        return str(error)
    return ""


def joined(pieces: list[TensorSlice]) -> dict[str, torch.Tensor]:
    """The model that all ranks hold together; every element comes from exactly one of them."""
    whole: dict[str, torch.Tensor] = {}
    filled: dict[str, int] = {}
    for piece in pieces:
        if piece.key.startswith("model/"):
            name = piece.key.removeprefix("model/")
            values = piece.values.flatten()
            into = whole.setdefault(name, torch.empty(piece.shape, dtype=values.dtype))
            into.view(-1)[piece.start : piece.stop] = values
            filled[name] = filled.get(name, 0) + values.numel()
    assert {name: tensor.numel() for name, tensor in whole.items()} == filled
    return whole
