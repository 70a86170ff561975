"""Three ways to distribute training, each sketched in a few lines on `Algorithm`, so that its verbs
are known to fit them.

They are sketches: no overlap, no prefetch, no buckets. Each must still equal `single`, see
docs/decisions/003-the-algorithm-contract.md."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.algorithms.single import Single
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Mesh
from smolrun.parts.precision import PRECISIONS
from smolrun.testing import run_ranks
from smolrun.wire.frame import Tag

STEPS, BATCH = 6, 12


class SketchedDP(Algorithm):
    """Replicas; one all_reduce per parameter after backward."""

    def synchronize(self, facts: dict[str, float]) -> PendingUpdate:
        table, work = self.share_facts({**facts, "is_finite": 1.0})
        works = [
            self.collectives.all_reduce(p.grad, async_op=True)
            for p in self.model.parameters()
            if p.grad is not None
        ]
        return PendingUpdate(self.steps_begun, table, [*works, work])

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        self.optimizer.zero_grad()
        return super().forward_backward(micro_batches)

    def bind_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]


class SketchedFSDP(Algorithm):
    """Stage 3: a rank holds a flat shard of every layer; a layer is whole only while it is used."""

    def place(self, model: nn.Module) -> None:
        assert isinstance(model, nn.Sequential)
        self.layers, self.shards = list(model), []
        for layer in self.layers:
            flat = torch.cat(
                [p.detach().flatten() for p in layer.parameters()] or [torch.zeros(0)]
            ).double()
            self.shards.append(
                nn.Parameter(
                    flat.tensor_split(self.collectives.size)[self.collectives.index].clone()
                )
            )
        super().place(nn.ParameterList(self.shards))

    def whole(self, index: int) -> dict[str, torch.Tensor]:
        layer = self.layers[index]
        flat = torch.empty(sum(p.numel() for p in layer.parameters()), dtype=torch.float64)
        self.collectives.all_gather(flat, self.shards[index].detach())
        parts = flat.split([p.numel() for p in layer.parameters()])
        named = zip(layer.named_parameters(), parts, strict=True)
        return {name: part.view_as(p).requires_grad_() for (name, p), part in named}

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=False)
        (batch,) = micro_batches
        hidden = [batch.inputs.double()]
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                hidden.append(torch.func.functional_call(layer, self.whole(index), (hidden[-1],)))
        head = hidden[-1].requires_grad_()
        loss = cross_entropy(head, batch.targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, head)
        for index in reversed(range(len(self.layers))):
            parameters, inputs = self.whole(index), hidden[index].detach().requires_grad_()
            output = torch.func.functional_call(self.layers[index], parameters, (inputs,))
            gradient, *own = torch.autograd.grad(output, [inputs, *parameters.values()], gradient)
            if own:
                self.shards[index].grad = torch.zeros_like(self.shards[index])
                self.collectives.reduce_scatter(
                    self.shards[index].grad, torch.cat([g.flatten() for g in own])
                )
        return {"loss_sum": loss.item(), "weight": len(batch.targets)}

    def synchronize(self, facts: dict[str, float]) -> PendingUpdate:
        table, work = self.share_facts({**facts, "is_finite": 1.0})
        return PendingUpdate(self.steps_begun, table, [work])

    def bind_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        return [shard.grad for shard in self.shards if shard.grad is not None]

    def norm_squared(self, gradients: list[torch.Tensor]) -> float:
        total = torch.tensor(Algorithm.norm_squared(self, gradients), dtype=torch.float64)
        self.collectives.all_reduce(total)
        return total.item()


class SketchedPipeline(Algorithm):
    """One stage of layers per rank; GPipe: all micro-batches forward, then all back, point to
    point."""

    def place(self, model: nn.Module) -> None:
        assert isinstance(model, nn.Sequential)
        size, me = self.collectives.size, self.collectives.index
        cuts = [len(model) * stage // size for stage in range(size + 1)]
        super().place(model[cuts[me] : cuts[me + 1]])
        self.is_first, self.is_last = me == 0, me == size - 1

    def give(self, kind: int, number: int, to: int, tensor: torch.Tensor) -> None:
        """Sends an activation (kind 0) or a gradient (kind 1) of a micro-batch."""
        self.context.mesh.send(to, Tag(10 + kind, self.steps_begun, number), tensor).wait()

    def take(self, kind: int, number: int, source: int, like: torch.Tensor) -> torch.Tensor:
        self.context.mesh.recv(source, Tag(10 + kind, self.steps_begun, number), like).wait()
        return like

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        self.optimizer.zero_grad()
        rank, ins, outs, facts = self.context.mesh.rank, [], [], {"loss_sum": 0.0, "weight": 0.0}
        for number, batch in enumerate(micro_batches):
            width = next(self.model.parameters()).shape[-1]
            empty = torch.empty(len(batch.targets), width, dtype=torch.float64)
            ins.append(
                (
                    batch.inputs.double()
                    if self.is_first
                    else self.take(0, number, rank - 1, empty)
                ).requires_grad_()
            )
            outs.append(self.model(ins[-1]))
            if not self.is_last:
                self.give(0, number, rank + 1, outs[-1].detach().contiguous())
        for number, batch in enumerate(micro_batches):
            if self.is_last:
                loss = cross_entropy(outs[number], batch.targets, reduction="sum")
                loss.backward()
                facts = {
                    "loss_sum": facts["loss_sum"] + loss.item(),
                    "weight": facts["weight"] + len(batch.targets),
                }
            else:
                outs[number].backward(
                    self.take(1, number, rank + 1, torch.empty_like(outs[number]))
                )
            if not self.is_first:
                gradient = ins[number].grad
                assert gradient is not None
                self.give(1, number, rank - 1, gradient.contiguous())
        return facts

    synchronize = SketchedFSDP.synchronize  # type: ignore[assignment]
    bind_gradients = SketchedDP.bind_gradients  # type: ignore[assignment]
    norm_squared = SketchedFSDP.norm_squared  # type: ignore[assignment]


def start() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 11), nn.Tanh(), nn.Linear(11, 5)
    ).double()


def global_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 9, generator=generator, dtype=torch.float64)
    return Batch(inputs, (inputs[:, :5].argmax(1)))


def run(
    cls: Callable[[Context], Algorithm],
    world_size: int,
    parts: Callable[[Mesh, Batch], list[Batch]],
    steps: int = STEPS,
) -> list[Any]:
    first = start()

    def rank_main(mesh: Mesh) -> Any:
        context = Context(
            mesh,
            torch.device("cpu"),
            PRECISIONS["float64"],
            lambda named: torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9),
            lambda update: 0.1,
            grad_clip=1.0,
        )
        algorithm = cls(context)
        algorithm.place(copy.deepcopy(first))
        results = [algorithm.train_step(parts(mesh, global_batch(step))) for step in range(steps)]
        return [(result.loss, result.grad_norm) for result in results if result is not None]

    return run_ranks(world_size, rank_main)


def share(mesh: Mesh, batch: Batch) -> list[Batch]:
    part = slice(BATCH * mesh.rank // mesh.world_size, BATCH * (mesh.rank + 1) // mesh.world_size)
    return [Batch(batch.inputs[part], batch.targets[part])]


def micro(mesh: Mesh, batch: Batch) -> list[Batch]:
    return [Batch(batch.inputs[i : i + 4], batch.targets[i : i + 4]) for i in range(0, BATCH, 4)]


@pytest.mark.parametrize(
    ("cls", "world_size", "parts"),
    [
        (SketchedDP, 3, share),
        (SketchedFSDP, 3, share),
        (SketchedFSDP, 2, share),
        (SketchedPipeline, 3, micro),
        (SketchedPipeline, 2, micro),
    ],
)
def test_the_contract_fits(
    cls: type[Algorithm], world_size: int, parts: Callable[[Mesh, Batch], list[Batch]]
) -> None:
    (reference,) = run(Single, 1, lambda mesh, batch: [batch])
    for trace in run(cls, world_size, parts):
        assert torch.allclose(torch.tensor(trace), torch.tensor(reference), rtol=0, atol=1e-12)
