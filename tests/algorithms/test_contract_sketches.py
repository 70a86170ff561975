"""Ways to distribute training that are not built yet, each sketched in a few lines on `Algorithm`:
what its verbs must be able to say. Experts equal `single` in float64, DiLoCo equals its own
simulation in one process. They are sketches: no overlap, no buckets.

See docs/decisions/021-a-contract-for-split-models-and-local-steps.md.

Source: Lepikhin et al., "GShard", 2020 (experts by all_to_all); Douillard et al., "DiLoCo",
2023."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.algorithms.contract import STEP_STATS, loss_sum
from smolrun.algorithms.single import Single
from smolrun.collectives.api import Collectives
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Mesh
from smolrun.parts.norms import squared_norm
from smolrun.parts.placement import DataCoordinates, plan_batches
from smolrun.parts.precision import PRECISIONS
from smolrun.testing import run_ranks

STEPS, BATCH, LENGTH, VOCABULARY = 6, 12, 4, 13


class Sketch(Algorithm):
    """Backward adds up in `parameter.grad`, and all of it is summed when `synchronize` returns."""

    def place(self, model: nn.Module) -> None:
        super().place(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=False)
        return super().forward_backward(micro_batches)

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        return PendingUpdate(self.steps_begun, *self.share_stats({**stats, "is_finite": 1.0}))

    def bind_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]


def documented() -> type[Algorithm]:
    """The example of docs/own_code.md, as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "own_code.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*class DataParallel[^`]*)```", text)
    names: dict[str, Any] = {}
    exec(code, names)
    found: type[Algorithm] = names["DataParallel"]
    return found


# -- experts ----


class Exchange(torch.autograd.Function):
    """Rows to the ranks that want them, and in backward their gradients back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: Collectives, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        width = rows.shape[-1]
        output = rows.new_empty(sum(received), width)
        sizes = ([n * width for n in received], [n * width for n in sent])
        group.all_to_all(output, rows.contiguous(), *sizes)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        back = Exchange.forward(_Ignored(), gradients[0], ctx.group, ctx.received, ctx.sent)
        return back, None, None, None


class _Ignored:
    """Stands in for a ctx."""


class Experts(nn.Module):
    """A router that sends every token to one of four experts; with `group`, each rank has some."""

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.group: Collectives | None = None
        self.received = 0

    def shard(self, group: Collectives) -> None:
        self.group = group
        each = len(self.experts) // group.size
        self.experts = self.experts[group.index * each : (group.index + 1) * each]

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        gate, choice = self.router(rows).softmax(-1).max(-1)
        order = choice.argsort(stable=True)
        counts = torch.bincount(choice, minlength=self.router.out_features)
        done = self.run_experts(rows[order], counts)
        output = torch.zeros_like(rows).index_copy(0, order, done)
        return hidden + (gate.unsqueeze(-1) * output).view_as(hidden)

    def run_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        if self.group is None:
            return self.run_own(rows, counts.view(1, -1))
        theirs = torch.empty_like(counts)
        self.group.all_to_all(theirs, counts)
        sent = counts.view(self.group.size, -1).sum(1).tolist()
        received = theirs.view(self.group.size, -1)
        come = Exchange.apply(rows, self.group, sent, received.sum(1).tolist())
        self.received += len(come)
        done = self.run_own(come, received)
        back: Tensor = Exchange.apply(done, self.group, received.sum(1).tolist(), sent)
        return back

    def run_own(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`counts[rank, expert]` rows each, in this order."""
        parts = rows.split(counts.flatten().tolist())
        own = [self.experts[i % len(self.experts)](part) for i, part in enumerate(parts)]
        return torch.cat(own)


class ExpertParallel(Sketch):
    """Dense parameters are replicas, every rank has its own experts and all ranks' tokens come to
    them: their gradients are sums over all samples already."""

    step_stats = (*STEP_STATS, "tokens_received")

    def place(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, Experts)]
        for layer in self.layers:
            layer.shard(self.collectives)
        self.own = {p for layer in self.layers for p in layer.experts.parameters()}
        super().place(model)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        before = sum(layer.received for layer in self.layers)
        stats = super().forward_backward(micro_batches)
        return {**stats, "tokens_received": sum(layer.received for layer in self.layers) - before}

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        pending = super().synchronize(stats)
        for parameter in self.model.parameters():
            if parameter not in self.own and parameter.grad is not None:
                pending.works.append(self.collectives.all_reduce(parameter.grad, async_op=True))
        return pending

    def norm_squared(self, gradients: list[Tensor]) -> float:
        dense = [
            p.grad for p in self.model.parameters() if p not in self.own and p.grad is not None
        ]
        experts = [p.grad for p in self.own if p.grad is not None]
        total = torch.tensor(squared_norm(experts), dtype=torch.float64)
        self.collectives.all_reduce(total)
        return total.item() + squared_norm(dense)


# -- local steps ----

SYNC_EVERY = 3


def outer_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


class DiLoCo(Sketch):
    """Steps of this rank alone; at every SYNC_EVERY-th the mean of what they changed is the
    gradient of an outer optimizer. Between these steps nothing is sent."""

    def place(self, model: nn.Module) -> None:
        super().place(model)
        self.shared = [parameter.detach().clone() for parameter in model.parameters()]
        self.outer = outer_optimizer(self.shared)

    def is_sync_step(self, step: int) -> bool:
        return (step + 1) % SYNC_EVERY == 0

    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        own = pending.stats.of(self.context.mesh.rank, "num_targets")
        norm = super().update(pending, own or 0.0, learning_rate)
        if self.is_sync_step(pending.step):
            for before, parameter in zip(self.shared, self.model.parameters(), strict=True):
                before.grad = before - parameter.detach()
                self.collectives.all_reduce(before.grad, "mean")
            self.outer.step()
            for before, parameter in zip(self.shared, self.model.parameters(), strict=True):
                parameter.data.copy_(before)
        return norm


def simulated_diloco(model: nn.Module, world_size: int) -> list[list[tuple[float, float]]]:
    """Loss and gradient norm of every step of every rank, in one process."""
    shared = [p.detach().clone() for p in model.parameters()]
    outer = outer_optimizer(shared)
    ranks = [copy.deepcopy(model) for _ in range(world_size)]
    inner = [optimizer(rank.parameters()) for rank in ranks]
    traces: list[list[tuple[float, float]]] = [[] for _ in ranks]
    for step in range(STEPS):
        for rank, model in enumerate(ranks):
            inner[rank].zero_grad()
            (batch,) = coordinates_part(DataCoordinates(rank, [1.0] * world_size), step, BATCH)
            loss = loss_sum(model(batch.inputs), batch.targets) / batch.targets.numel()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            inner[rank].step()
            traces[rank].append((loss.item(), norm.item()))
        if (step + 1) % SYNC_EVERY == 0:
            for before, *after in zip(shared, *(m.parameters() for m in ranks), strict=True):
                before.grad = before - torch.stack([p.detach() for p in after]).mean(0)
            outer.step()
            for model in ranks:
                for before, parameter in zip(shared, model.parameters(), strict=True):
                    parameter.data.copy_(before)
            mean = sum(trace[-1][0] for trace in traces) / world_size
            for trace in traces:
                trace[-1] = (mean, trace[-1][1])
    return traces


# -- the tests ----


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def dense() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Embedding(VOCABULARY, 8), nn.Linear(8, 11), nn.Tanh(), nn.Linear(11, VOCABULARY))
    return nn.Sequential(*layers).double()


def mixture() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Embedding(VOCABULARY, 8), Experts(8), nn.Tanh(), nn.Linear(8, VOCABULARY))
    return nn.Sequential(*layers).double()


def global_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return Batch(tokens, (tokens * 5 + 1) % VOCABULARY)


def coordinates_part(place: DataCoordinates, step: int, micro: int) -> list[Batch]:
    """The micro-batches that a rank at these coordinates reads."""
    batch = global_batch(step)
    plan = plan_batches(BATCH, place.weights, place.index, micro)
    parts = [slice(p.start, p.stop) for p in plan.positions(0)]
    return [Batch(batch.inputs[part], batch.targets[part]) for part in parts]


def run(
    cls: Callable[[Context], Algorithm],
    world_size: int,
    model: Callable[[], nn.Module] = dense,
    micro: int = 4,
    look: Callable[[Algorithm, Any], Any] = lambda algorithm, result: (
        result.loss,
        result.grad_norm,
    ),
    before: Callable[[Algorithm], None] = lambda algorithm: None,
) -> list[list[Any]]:
    first = model()

    def rank_main(mesh: Mesh) -> list[Any]:
        context = Context(
            mesh,
            torch.device("cpu"),
            PRECISIONS["float64"],
            lambda named: optimizer([p for _, p in named]),
            lambda update: 0.1,
            grad_clip=1.0,
            num_outputs=VOCABULARY,
        )
        algorithm = cls(context)
        algorithm.place(copy.deepcopy(first))
        place = algorithm.data_coordinates([1.0] * world_size)
        found = []
        for step in range(STEPS):
            before(algorithm)
            result = algorithm.train_step(coordinates_part(place, step, micro))
            found.append(look(algorithm, result))
        algorithm.finish()
        return found

    return run_ranks(world_size, rank_main)


def close(trace: Any, reference: Any) -> bool:
    return torch.allclose(torch.tensor(trace), torch.tensor(reference), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("cls", "world_size", "model"),
    [
        (documented(), 3, dense),
        (ExpertParallel, 2, mixture),
        (ExpertParallel, 4, mixture),
    ],
)
def test_a_sketch_equals_single(
    cls: type[Algorithm], world_size: int, model: Callable[[], nn.Module]
) -> None:
    (reference,) = run(Single, 1, model, micro=BATCH)
    for trace in run(cls, world_size, model, micro=BATCH if model is mixture else 2):
        assert close(trace, reference)


def test_every_token_comes_to_one_expert() -> None:
    told = run(ExpertParallel, 2, mixture, look=lambda _, r: r.stats.total("tokens_received"))
    assert told == [[float(BATCH * LENGTH)] * STEPS] * 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_diloco_equals_its_simulation(world_size: int) -> None:
    traces = run(DiLoCo, world_size, micro=BATCH)
    for trace, reference in zip(traces, simulated_diloco(dense(), world_size), strict=True):
        assert close(trace, reference)


def test_between_sync_steps_nothing_is_sent_and_nobody_stops() -> None:
    sent: dict[int, list[int]] = {0: [], 1: []}

    def before(algorithm: Algorithm) -> None:
        mesh = algorithm.context.mesh
        sent[mesh.rank].append(mesh.bytes_sent)
        algorithm.wants_stop = mesh.rank == 1

    told = run(DiLoCo, 2, micro=BATCH, look=lambda _, r: r.wants_stop, before=before)
    at_sync = [(step + 1) % SYNC_EVERY == 0 for step in range(STEPS)]
    assert told == [at_sync, at_sync]
    for totals in sent.values():
        moved = [after > now for now, after in itertools.pairwise(totals)]
        assert moved == at_sync[: len(moved)]
