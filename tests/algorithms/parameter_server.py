"""Runs edp in one process, and replays what it did: for tests."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from smolrun.algorithms.base import Algorithm, Context, StepResult
from smolrun.algorithms.contract import FORWARD
from smolrun.algorithms.edp import edp
from smolrun.algorithms.edp.server import STALENESS_LR_SCALES
from smolrun.data.splits import Batch
from smolrun.events import Event, PushApplied
from smolrun.mesh.mesh import Mesh
from smolrun.parts.placement import BatchPlan, plan_batches
from smolrun.parts.precision import PRECISIONS
from tests.algorithms import worlds

KEYS: dict[str, Any] = {
    "server_trains": False,
    "pushes_per_batch": "auto",
    "staleness_lr_scale": "inverse",
    "wait_fraction": 0.5,
    "min_ranks": 1,
}


def samples(model: str, step: int, index: int, count: int) -> Batch:
    """Part `index` of `count` of a global batch."""
    plan = plan_batches(worlds.GLOBAL_BATCH, [1.0], 0).part(index, count)
    (batch,) = worlds.share(worlds.sample(model, step), plan, step)
    return batch


@dataclasses.dataclass
class Seen:
    """What one rank saw; the server also what it ended with."""

    results: list[StepResult]
    parameters: dict[str, torch.Tensor]

    @property
    def events(self) -> list[Event]:
        return [event for result in self.results for event in result.events]

    @property
    def pushes(self) -> list[PushApplied]:
        return [event for event in self.events if isinstance(event, PushApplied)]


def start(model: str, precision: str = "float64") -> nn.Module:
    torch.manual_seed(0)
    return worlds.MODELS[model]().to(PRECISIONS[precision].parameters)


def place(
    mesh: Mesh,
    model: nn.Module,
    *,
    precision: str = "float64",
    optimizer: str = "sgd",
    keys: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> Algorithm:
    context = dataclasses.replace(worlds.context(mesh, precision, optimizer, 0), **(more or {}))
    algorithm = edp(context, **{**KEYS, **(keys or {})})
    algorithm.place(copy.deepcopy(model))
    return algorithm


def fit(
    algorithm: Algorithm,
    model: str,
    steps: int,
    *,
    before: Callable[[int], None] = lambda count: None,
    tell: Callable[[StepResult], None] = lambda result: None,
) -> Seen:
    """The trainer's loop, to its end. `before(n)` is called before the n-th work item, `tell` gets
    every result."""
    torch.set_num_threads(1)  # of this thread; with more, products are rounded otherwise
    seen = Seen([], {})
    count = 0
    while share := algorithm.next_assignment(steps):
        before(count)
        count += 1
        part = share.part
        assert part is not None
        batches = [samples(model, share.step, part.index, part.count)] if part.count else []
        result = algorithm.train_step(batches)
        if result is not None:
            seen.results.append(result)
            tell(result)
            if result.wants_stop:
                break
    seen.parameters = {name: p.detach().clone() for name, p in algorithm.model.named_parameters()}
    algorithm.finish()
    return seen


def replay(
    model: str,
    pushes: Sequence[PushApplied],
    per_step: int,
    *,
    lr_scale: str = "inverse",
    precision: str = "float64",
    optimizer: str = "sgd",
) -> dict[str, torch.Tensor]:
    """One process that does what the log of arrivals says, with nothing of smolrun's but the
    optimizer: no work queue, no server."""
    torch.set_num_threads(1)
    context: Context = worlds.context(None, precision, optimizer, 0)  # type: ignore[arg-type]
    net = start(model, precision)
    worker = copy.deepcopy(net)
    step_with = context.make_optimizer(net.named_parameters())
    versions = [copy.deepcopy(net.state_dict())]
    for push in pushes:
        step, index = divmod(push.ticket, per_step)
        batch = samples(model, step, index, per_step)
        worker.load_state_dict(versions[push.version])
        worker.zero_grad()
        inputs = batch.inputs
        if inputs.is_floating_point():
            inputs = inputs.to(PRECISIONS[precision].parameters)
        worlds.reseed(FORWARD, batch.position)
        logits = worker(inputs)
        loss = cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), reduction="sum")
        loss.backward()
        weight = int((batch.targets != -100).sum())
        squares = 0.0
        for mine, theirs in zip(net.parameters(), worker.parameters(), strict=True):
            mine.grad = torch.zeros_like(mine) if theirs.grad is None else theirs.grad.clone()
        flat = torch.cat([p.grad.flatten() for p in reversed(list(net.parameters()))])
        squares = float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
        norm = math.sqrt(squares) / weight
        shrunk = context.grad_clip / norm if 0 < context.grad_clip < norm else 1.0
        age = len(versions) - 1 - push.version
        for group in step_with.param_groups:
            now = (len(versions) - 1) // per_step
            group["lr"] = context.learning_rate(now) * STALENESS_LR_SCALES[lr_scale](age)
        for p in net.parameters():
            p.grad.mul_(shrunk / weight)
        step_with.step()
        versions.append(copy.deepcopy(net.state_dict()))
    return versions[-1]


def plan() -> BatchPlan:
    return plan_batches(worlds.GLOBAL_BATCH, [1.0], 0)


def make_sgd(named: Any, *, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in named], lr=lr)
