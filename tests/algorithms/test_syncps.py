"""What syncps promises beyond equal results: bytes, an average, one verdict on a bad gradient, and
that nobody is left waiting."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import nn

from smolrun.algorithms.base import Algorithm, Context, StepResult
from smolrun.algorithms.contract import STEP_STATS
from smolrun.algorithms.syncps import syncps
from smolrun.data.splits import Batch
from smolrun.errors import PeerLost
from smolrun.mesh.memory import MemoryWorld
from smolrun.mesh.mesh import Mesh
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.replicas import parameter_hash
from smolrun.testing import run_ranks
from tests.algorithms import worlds
from tests.algorithms.test_equivalence import difference

KEYS: dict[str, Any] = {
    "server_trains": True,
    "straggler_timeout_s": 0.0,
    "ema_decay": 0.0,
    "pull_weights": "newest",
    "bucket_mb": 0.25,
}


def build(
    mesh: Mesh, width: int = 64, staleness: int = 0, precision: str = "float32", **keys: Any
) -> Algorithm:
    torch.manual_seed(mesh.rank)  # different on purpose: place() must make the replicas equal
    context = Context(
        mesh=mesh,
        device=torch.device("cpu"),
        precision=PRECISIONS[precision],
        make_optimizer=lambda named: torch.optim.SGD([parameter for _, parameter in named], lr=0.1),
        learning_rate=lambda update: 0.1,
        staleness=staleness,
        expected_weight=4096,  # float16 starts with a scale that does not overflow here
    )
    algorithm = syncps(context, **{**KEYS, **keys})
    algorithm.place(nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 8)))
    return algorithm


def batch(rank: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(rank * 1000 + step)
    return Batch(
        torch.randn(4, 16, generator=generator), torch.randint(8, (4,), generator=generator)
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_worker_sends_its_gradient_and_gets_the_weights(world_size: int) -> None:
    def rank_main(mesh: Mesh) -> tuple[int, int, int]:
        algorithm = build(mesh, width=40_000)
        algorithm.train_step([batch(mesh.rank, 0)])
        algorithm.collectives.barrier()
        sent, received = mesh.bytes_sent, mesh.bytes_received
        algorithm.collectives.barrier()  # nobody sends before all have looked
        algorithm.train_step([batch(mesh.rank, 1)])
        algorithm.collectives.barrier()
        size = sum(parameter.numel() * 4 for parameter in algorithm.model.parameters())
        return mesh.bytes_sent - sent, mesh.bytes_received - received, size

    server, *workers = run_ranks(world_size, rank_main, kind="tcp")
    for times, told in ((world_size - 1, server), *((1, worker) for worker in workers)):
        *moved, size = told
        for count in moved:
            assert times * size <= count <= 1.02 * times * size


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_server_that_does_not_train_changes_nothing(world_size: int) -> None:
    reference = worlds.train("single", "language_model", 1)[0]
    for kind in ("memory", "tcp"):
        traces = worlds.train(
            "syncps",
            "language_model",
            world_size,
            overrides={"server_trains": False, "bucket_mb": 0.001},
            kind=kind,
        )
        assert difference(traces[0], reference) <= 1e-12
        assert traces[0].results[0].samples[0] == 0
        assert all(trace.hashes == traces[0].hashes for trace in traces)


def averaged(pull: str, decay: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A loop that a reader can hold in mind; the average after it, and the losses."""
    torch.manual_seed(0)
    net = worlds.mlp().double()
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    losses = []
    for step in range(10):
        data = worlds.sample("mlp", step)
        inputs = data.inputs.double()
        at = average if pull == "average" else dict(net.named_parameters())
        leaves = {name: value.detach().clone().requires_grad_() for name, value in at.items()}
        logits = torch.func.functional_call(net, leaves, (inputs,))
        loss = nn.functional.cross_entropy(logits, data.targets)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        losses.append(loss.item())
        with torch.no_grad():
            for (name, parameter), gradient in zip(net.named_parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
                average[name] = decay * average[name] + (1 - decay) * parameter
    return average, losses


@pytest.mark.parametrize("pull", ["newest", "average"])
def test_the_average_is_what_it_says(pull: str) -> None:
    from functools import partial

    from smolrun.training.optimizer import make_optimizer

    plain = {
        "grad_clip": 0.0,
        "learning_rate": lambda update: 0.05,
        "make_optimizer": partial(make_optimizer, name="sgd", lr=0.05),
    }
    average, losses = averaged(pull, 0.8)
    overrides = {"ema_decay": 0.8, "pull_weights": pull}
    traces = worlds.train("syncps", "mlp", 3, overrides=overrides, more=plain)
    found = {piece.key: piece.values.view(piece.shape) for piece in traces[0].pieces}
    for name, value in average.items():
        assert torch.allclose(found[f"average/{name}"], value, rtol=0, atol=1e-12)
    assert traces[0].losses == pytest.approx(losses, abs=1e-12)
    assert traces[0].hashes == traces[1].hashes == traces[2].hashes
    net = worlds.mlp().double()
    net.load_state_dict(average)
    data = worlds.sample("mlp", 999)
    loss = nn.functional.cross_entropy(net(data.inputs.double()), data.targets, reduction="sum")
    assert traces[0].eval is not None, "the server shows the average"
    assert traces[0].eval.loss == pytest.approx(loss.item(), abs=1e-10)


@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_nan_in_one_rank_is_skipped_by_all_and_named(precision: str, bad: int) -> None:
    def rank_main(mesh: Mesh) -> tuple[StepResult | None, bool, float]:
        algorithm = build(mesh, precision=precision)
        algorithm.train_step([batch(mesh.rank, 0)])
        before = parameter_hash(algorithm.replica_tensors().values())
        if mesh.rank == bad:
            for parameter in algorithm.model.parameters():
                parameter.register_hook(lambda gradient: gradient * math.nan)
        result = algorithm.train_step([batch(mesh.rank, 1)])
        same = before == parameter_hash(algorithm.replica_tensors().values())
        return result, same, algorithm.loss_scale.value

    told = run_ranks(3, rank_main)
    for result, is_unchanged, _ in told:
        assert result is not None and result.grad_norm is None and result.nonfinite_ranks == (bad,)
        assert is_unchanged
    assert len({scale for *_, scale in told}) == 1


@pytest.mark.parametrize("kind", ["memory", "tcp"])
def test_a_run_that_is_stopped_leaves_nobody_waiting(kind: str) -> None:
    """With gradients in flight, which go into the checkpoint, as in a run that is stopped."""

    def rank_main(mesh: Mesh) -> int:
        algorithm = build(mesh, staleness=2)
        for step in range(5):
            algorithm.train_step([batch(mesh.rank, step)])
        worlds.to_write(algorithm)
        algorithm.finish()
        return len(algorithm.pending_updates)

    assert run_ranks(3, rank_main, kind=kind) == [2, 2, 2]


@pytest.mark.parametrize("straggler_timeout_s", [0.0, 5.0])
def test_a_server_sees_at_once_that_a_worker_is_lost(straggler_timeout_s: float) -> None:
    world = MemoryWorld(2, timeout_s=20)
    seen: list[BaseException] = []

    def server() -> None:
        try:
            algorithm = build(
                world.meshes[0], straggler_timeout_s=straggler_timeout_s, server_trains=False
            )
            algorithm.train_step([batch(0, 0)])
        except BaseException as error:
            seen.append(error)

    def worker() -> None:
        build(world.meshes[1], straggler_timeout_s=straggler_timeout_s, server_trains=False)
        world.lose(1)

    threads = [threading.Thread(target=run) for run in (server, worker)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    for mesh in world.meshes:
        mesh.close()
    assert isinstance(seen[0], PeerLost)


def test_only_the_server_has_an_optimizer_and_room_for_the_others() -> None:
    def rank_main(mesh: Mesh) -> tuple[bool, int]:
        algorithm = build(mesh, staleness=1)
        algorithm.train_step([batch(mesh.rank, 0)])
        workers = getattr(algorithm, "workers", [])
        room = sum(flat.nbytes for worker in workers for slot in worker.flat for flat in slot)
        algorithm.drain()
        return hasattr(algorithm, "optimizer"), room

    size = 4 * (16 * 64 + 64 + 64 * 8 + 8)
    assert run_ranks(3, rank_main) == [(True, 2 * 2 * size), (False, 0), (False, 0)]


def test_facts_of_all_ranks_reach_all_ranks() -> None:
    def rank_main(mesh: Mesh) -> tuple[Any, ...]:
        algorithm = build(mesh)
        result = algorithm.train_step([batch(mesh.rank, 0)])
        assert result is not None
        return result.loss, result.num_targets, result.samples, result.computed_s, result.grad_norm

    told = run_ranks(3, rank_main)
    assert told[0] == told[1] == told[2]
    assert told[0][2] == (4, 4, 4) and len(STEP_STATS) >= 6
