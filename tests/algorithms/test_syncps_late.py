"""Stragglers of syncps: whoever is late is dropped, counted and named, jumps to where the others
are, and never keeps anybody waiting, not even at the end.

Slowness is made by gates, so who is late follows from the test and not from the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from smolrun.algorithms.base import StepResult
from smolrun.data.splits import Batch
from smolrun.events import Event, GradientDropped
from smolrun.mesh.mesh import Mesh
from smolrun.parts.replicas import parameter_hash
from smolrun.testing import run_ranks
from smolrun.training.evaluation import Evaluation
from smolrun.training.step_metrics import StepMetrics
from smolrun.training.trainer import Callback, Periodic, Trainer
from tests.algorithms.test_syncps import batch, build
from tests.waiting import until

STEPS = 8
PATIENCE_S = 2.0  # far more than a step takes, so nobody is late by chance

# gate(step, begun): blocks the last rank before it trains on `step`; begun[rank] is each one's step
Gate = Callable[[int, list[int]], None]


@dataclass
class Told:
    """What one rank saw."""

    steps: list[int] = field(default_factory=list)  # that it trained on
    results: list[StepResult] = field(default_factory=list)
    digest: str = ""


def train(
    gate: Gate,
    *,
    world_size: int = 3,
    kind: str = "memory",
    stop_at: int | None = None,
    meet_at: int | None = None,
) -> list[Told]:
    """Before step `meet_at` the server waits until all that the last rank computes has come."""
    begun = [0] * world_size

    def rank_main(mesh: Mesh) -> Told:
        told, is_last = Told(), mesh.rank == world_size - 1
        algorithm = build(mesh, straggler_timeout_s=PATIENCE_S)
        algorithm.start_barrier()
        while share := algorithm.next_assignment(STEPS):
            begun[mesh.rank] = share.step
            if is_last:
                gate(share.step, begun)
            if mesh.rank == 0 and share.step == meet_at:
                until(lambda: all(w.is_done for w in algorithm.workers[-1].expected.values()))
            told.steps.append(share.step)
            algorithm.wants_stop = is_last and share.step == stop_at
            result = algorithm.train_step([batch(mesh.rank, share.step)])
            assert result is not None
            told.results.append(result)
            if result.wants_stop:
                break
        begun[mesh.rank] = STEPS
        algorithm.finish()
        told.digest = parameter_hash(algorithm.replica_tensors().values())
        return told

    return run_ranks(world_size, rank_main, kind=kind)


def replayed(start: list[torch.Tensor], results: list[StepResult]) -> list[torch.Tensor]:
    """One process that is told whose gradients were there."""
    first, bias, second, last = (tensor.clone().requires_grad_() for tensor in start)
    parameters = [first, bias, second, last]
    for result in results:
        parts = []
        for rank, count in enumerate(result.samples):
            if count:
                data = batch(rank, result.step)
                logits = torch.tanh(data.inputs @ first.T + bias) @ second.T + last
                loss = cross_entropy(logits, data.targets, reduction="sum")
                parts.append(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            for parameter, *gradients in zip(parameters, *parts, strict=True):
                parameter -= 0.1 * sum(gradients) / sum(result.samples)
    return [parameter.detach() for parameter in parameters]


def test_who_is_late_once_is_dropped_and_catches_up() -> None:
    def gate(step: int, begun: list[int]) -> None:
        if step == 1:
            until(lambda: begun[0] >= 4)

    server, other, late = train(gate, kind="tcp", meet_at=5)
    assert [result.step for result in server.results] == list(range(STEPS))
    assert [r.late for r in server.results] == [{}, {2: 1}, *[{}] * (STEPS - 2)]
    assert other.steps == list(range(STEPS))
    assert late.steps[:2] == [0, 1] and late.steps[2] >= 4, "it jumps"
    assert late.steps[2:] == list(range(late.steps[2], STEPS)), "and stays"
    away = range(1, late.steps[2])
    assert [r.samples for r in server.results] == [
        (4, 4, 0) if step in away else (4, 4, 4) for step in range(STEPS)
    ]
    assert len({told.digest for told in (server, other, late)}) == 1
    assert late.results[-1].loss == server.results[-1].loss


def test_the_others_learn_what_they_would_without_it() -> None:
    """A replay in one process, told whose gradients were there."""
    final: list[list[torch.Tensor]] = []

    def gate(step: int, begun: list[int]) -> None:
        if step == 2:
            until(lambda: begun[0] >= 5)

    begun = [0] * 3

    def rank_main(mesh: Mesh) -> tuple[list[torch.Tensor], list[StepResult], list[torch.Tensor]]:
        algorithm = build(mesh, straggler_timeout_s=PATIENCE_S)
        start = [parameter.detach().clone() for parameter in algorithm.model.parameters()]
        results = []
        while share := algorithm.next_assignment(STEPS):
            begun[mesh.rank] = share.step
            if mesh.rank == 2:
                gate(share.step, begun)
            result = algorithm.train_step([batch(mesh.rank, share.step)])
            assert result is not None
            results.append(result)
        algorithm.finish()
        return start, results, [p.detach().clone() for p in algorithm.model.parameters()]

    for rank, (start, results, found) in enumerate(run_ranks(3, rank_main)):
        if rank == 0:
            assert [sum(result.samples) for result in results].count(8) >= 3
            expected = replayed(start, results)
        final.append(found)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_a_rank_that_is_late_all_the_time_goes_on_to_the_end() -> None:
    def gate(step: int, begun: list[int]) -> None:
        until(lambda: begun[0] > step)  # until the server has gone on without it

    server, other, late = train(gate, world_size=3)
    assert [result.step for result in server.results] == list(range(STEPS))
    dropped = [result.late[2] for result in server.results if result.late]
    assert dropped == list(range(1, len(dropped) + 1)) and len(dropped) == len(late.steps)
    assert late.steps == sorted(set(late.steps)) and len(late.steps) >= 2
    assert all(result.samples == (4, 4, 0) for result in server.results)
    assert server.digest == other.digest == late.digest, "it has the last weights all the same"


def test_nobody_hangs_when_the_last_gradient_is_late() -> None:
    def gate(step: int, begun: list[int]) -> None:
        if step == STEPS - 1:
            until(lambda: begun[0] == STEPS and begun[1] == STEPS)

    server, _, late = train(gate)
    assert server.results[-1].late == {2: 1}
    assert late.steps == list(range(STEPS)) and late.digest == server.digest


def test_a_wish_to_stop_counts_although_its_gradient_does_not() -> None:
    def gate(step: int, begun: list[int]) -> None:
        if step == 2:
            until(lambda: begun[0] >= 3)

    server, other, late = train(gate, stop_at=2)
    assert server.results[-1].wants_stop and server.results[-1].step < STEPS - 1
    assert server.results[-1].step == other.results[-1].step == late.results[-1].step


def test_the_loop_names_who_was_late_and_saves_what_was_jumped_over() -> None:
    begun = [0] * 3

    class BatchLoader:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def load(self, step: int, part: object = None) -> list[Batch]:
            begun[self.rank] = step
            if self.rank == 2 and step == 1:
                until(lambda: begun[0] >= 6)
            return [batch(self.rank, step)]

    def rank_main(mesh: Mesh) -> tuple[list[Event], list[int]]:
        algorithm = build(mesh, straggler_timeout_s=PATIENCE_S)
        events: list[Event] = []
        saved: list[int] = []

        class Recorder(Periodic):
            def run(self, step: int, due: int) -> None:
                saved.append(due)

        callbacks: list[Callback] = [StepMetrics(algorithm, events.append)]
        if algorithm.can_evaluate:
            callbacks.append(Evaluation(algorithm, lambda: [[batch(9, 9)]], 3, events.append))
        if algorithm.has_checkpoint_state:
            callbacks.append(Recorder(4))
        Trainer(
            algorithm,
            BatchLoader(mesh.rank),
            steps=STEPS,
            callbacks=callbacks,
            should_stop=lambda: False,
        ).fit()
        algorithm.finish()
        return events, saved

    (events, saved), (_, nothing), (theirs, _) = run_ranks(3, rank_main)
    assert [event for event in events if isinstance(event, GradientDropped)] == [
        GradientDropped(1, 2, 1)
    ]
    assert saved == [4, STEPS] and nothing == []
    assert {type(event).__name__ for event in events} >= {"EvalDone", "StepDone"}
    assert "EvalDone" not in {type(event).__name__ for event in theirs}
