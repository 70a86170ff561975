"""What classicdp promises beyond equal results: bytes, overlap, bounded drift, and one verdict on a
bad gradient."""

from __future__ import annotations

import math
import platform
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from smolrun.algorithms.base import Context, StepResult
from smolrun.algorithms.classicdp import ClassicDP, classicdp, device_class, gather_classes
from smolrun.collectives.api import new_group
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Mesh
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.replicas import parameter_hash
from smolrun.testing import run_ranks


def context(mesh: Mesh, *, staleness: int = 0, precision: str = "float32") -> Context:
    return Context(
        mesh=mesh,
        device=torch.device("cpu"),
        precision=PRECISIONS[precision],
        make_optimizer=lambda named: torch.optim.SGD([parameter for _, parameter in named], lr=0.1),
        learning_rate=lambda update: 0.1,
        staleness=staleness,
        expected_weight=4096,  # float16 starts with a scale that does not overflow here
    )


def build(mesh: Mesh, width: int = 64, **keys: int | str) -> ClassicDP:
    torch.manual_seed(mesh.rank)  # different on purpose: place() must make the replicas equal
    algorithm = ClassicDP(context(mesh, **keys), bucket_mb=0.25)  # type: ignore[arg-type]
    algorithm.place(nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 8)))
    return algorithm


def batch(rank: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(rank * 1000 + step)
    return Batch(
        torch.randn(4, 16, generator=generator), torch.randint(8, (4,), generator=generator)
    )


@pytest.mark.parametrize(
    ("world_size", "staleness", "shard_optimizer"),
    [(2, 0, False), (3, 0, False), (3, 2, False), (3, 0, True), (4, 0, False)],
)
def test_bytes_per_step_are_2_times_n_minus_1_over_n_of_the_gradient(
    world_size: int, staleness: int, shard_optimizer: bool
) -> None:
    def rank_main(mesh: Mesh) -> tuple[int, int, int]:
        given = context(mesh, staleness=staleness)
        algorithm = classicdp(given, bucket_mb=0.25, shard_optimizer=shard_optimizer)
        algorithm.place(nn.Sequential(nn.Linear(16, 40_000), nn.Tanh(), nn.Linear(40_000, 8)))

        def train(steps: int) -> None:
            for step in range(steps):
                algorithm.train_step([batch(mesh.rank, step)])
            algorithm.drain()
            algorithm.replica_tensors()  # waits for what is on its way
            algorithm.collectives.barrier()

        train(1)
        sent, received = mesh.bytes_sent, mesh.bytes_received
        algorithm.collectives.barrier()  # who is first here may not send before all have looked
        train(3)
        gradient_bytes = sum(parameter.numel() * 4 for parameter in algorithm.model.parameters())
        return mesh.bytes_sent - sent, mesh.bytes_received - received, 3 * gradient_bytes

    for sent, received, gradient_bytes in run_ranks(world_size, rank_main, kind="tcp"):
        least = 2 * (world_size - 1) / world_size * gradient_bytes
        print(f"{world_size} ranks sent {sent / gradient_bytes:.4f} of their gradients")
        assert least * 0.999 <= sent <= 1.02 * least
        assert least * 0.999 <= received <= 1.02 * least


def test_replicas_start_equal_although_their_seeds_differ() -> None:
    hashes = run_ranks(3, lambda mesh: parameter_hash(build(mesh).replica_tensors().values()))
    assert len(set(hashes)) == 1


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_no_rank_runs_further_ahead_than_the_bound(staleness: int) -> None:
    """Rank 1 is held back at random; at every moment, all ranks' steps begun differ by at most the
    bound."""
    begun, lock, worst = [0, 0, 0], threading.Lock(), [0]
    release = threading.Semaphore(0)

    def rank_main(mesh: Mesh) -> None:
        algorithm = build(mesh, staleness=staleness)
        for step in range(20):
            if mesh.rank == 1:
                release.acquire(timeout=10)
            with lock:
                begun[mesh.rank] = step
                worst[0] = max(worst[0], max(begun) - min(begun))
            algorithm.train_step([batch(mesh.rank, step)])
        algorithm.drain()

    def let_go() -> None:
        for _ in range(20):
            deadline = (
                time.monotonic() + 5
            )  # until the others have run into the bound, then let the straggler do one step
            while begun[0] - begun[1] < staleness and begun[0] < 19 and time.monotonic() < deadline:
                time.sleep(0.001)
            release.release()

    holder = threading.Thread(target=let_go)
    holder.start()
    run_ranks(3, rank_main, kind="tcp")
    holder.join()
    # A rank may have begun step t+1 while the straggler has not yet noted that it began t+1-K: one
    # more than the bound.
    assert staleness <= worst[0] <= staleness + 1


def poisoned(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_nan_in_one_rank_is_skipped_by_all_and_named(precision: str) -> None:
    def rank_main(mesh: Mesh) -> tuple[StepResult | None, StepResult | None, bool]:
        algorithm = build(mesh, precision=precision)
        good = algorithm.train_step([batch(mesh.rank, 0)])
        before = parameter_hash(algorithm.replica_tensors().values())
        if mesh.rank == 1:
            poisoned(algorithm.model)
        bad = algorithm.train_step([batch(mesh.rank, 1)])
        return good, bad, before == parameter_hash(algorithm.replica_tensors().values())

    for good, bad, is_unchanged in run_ranks(3, rank_main):
        assert good is not None and good.grad_norm is not None and good.nonfinite_ranks == ()
        assert bad is not None and bad.grad_norm is None and bad.nonfinite_ranks == (1,)
        assert is_unchanged


def test_a_wish_to_stop_reaches_all_ranks_at_one_step() -> None:
    def rank_main(mesh: Mesh) -> int:
        algorithm = build(mesh)
        for step in range(50):
            algorithm.wants_stop = mesh.rank == 2 and step == 7
            result = algorithm.train_step([batch(mesh.rank, step)])
            if result is not None and result.wants_stop:
                return step
        return -1

    assert run_ranks(3, rank_main) == [7, 7, 7]


class OwnClock(threading.local):
    """A clock of each rank's own thread, which goes on by a second whenever it is read."""

    now_s = 0.0

    def __call__(self) -> float:
        self.pass_s(1.0)
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_slowest_rank_is_named_by_those_who_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = OwnClock()
    monkeypatch.setattr("smolrun.parts.step_clock.time", SimpleNamespace(perf_counter=clock))

    def rank_main(mesh: Mesh) -> int | None:
        algorithm = build(mesh)
        if mesh.rank == 1:
            algorithm.model.register_forward_hook(lambda *_: clock.pass_s(100.0))
        result = algorithm.train_step([batch(mesh.rank, 0)])
        assert result is not None
        return result.waited_for

    assert run_ranks(3, rank_main) == [1, None, 1]


def test_whatever_rounds_differently_is_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    found = [device_class(cpu), device_class(torch.device("mps"))]
    assert torch.__version__ in found[0]
    for owner, name, value in (
        (platform, "system", lambda: "Darwin"),
        (platform, "machine", lambda: "arm64"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        (torch, "__version__", "2.99"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            found.append(device_class(cpu))
    assert len(set(found)) == len(found) == 6


def test_every_rank_learns_the_classes_of_all() -> None:
    def rank_main(mesh: object) -> list[str]:
        collectives = new_group(mesh)  # type: ignore[arg-type]
        return gather_classes(collectives, f"{'x' * 300 if collectives.index == 1 else 'Linux a'}")

    for found in run_ranks(3, rank_main):
        assert found == ["Linux a", "x" * 160, "Linux a"]
