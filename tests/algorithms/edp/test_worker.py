"""What a worker pushes is what the server reads, for every dtype; and how long a worker waits."""

from __future__ import annotations

import queue

import pytest
import torch
from torch import Tensor

from smolrun.algorithms.edp.base import FlatModel
from smolrun.algorithms.edp.protocol import MessageKind, PushHeader, WorkMessage
from smolrun.algorithms.edp.server import EventQueue, PushReceived, WorkerHandle
from smolrun.algorithms.edp.worker import ParameterServerClient, WaitBudget
from smolrun.mesh.mesh import Mesh
from smolrun.parts.quantization import Quantization
from smolrun.testing import run_ranks

BLOCK = 32
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def gradient(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2000 * BLOCK + 7, generator=generator, dtype=torch.float64).to(dtype)


def half_a_step(sent: Tensor) -> Tensor:
    """Of every number's block."""
    largest = [block.abs().max().double() for block in sent.split(BLOCK)]
    return torch.stack(largest).repeat_interleave(BLOCK)[: len(sent)] * (0.5001 / 127)


def pushed(sent: Tensor, quantization: Quantization, into: torch.dtype, count: int = 1) -> Tensor:
    """The same gradient `count` times, one after the other; returns the sum of what arrived."""

    def rank_main(mesh: Mesh) -> Tensor:
        model = FlatModel([torch.nn.Parameter(torch.zeros_like(sent))])
        total = torch.zeros(len(sent), dtype=torch.float64)
        if mesh.rank == 0:
            serve(mesh, model, total)
        else:
            client = ParameterServerClient(mesh, model, quantization, WaitBudget(0.0))
            while item := client.next_item():
                client.push(PushHeader(item.number, 0, 0.0, 1.0, 1.0, 0.0), [sent])
        return total

    def serve(mesh: Mesh, model: FlatModel, total: Tensor) -> None:
        events: EventQueue = queue.SimpleQueue()
        worker = WorkerHandle(mesh, 1, model, quantization, events)
        worker.start()
        worker.send_weights_if_due(0)
        gradient = [torch.zeros(len(sent), dtype=into)]
        for number in range(count):
            worker.send(WorkMessage(MessageKind.ASSIGN_WORK, number, 0, count))
            while not isinstance(events.get(timeout=mesh.timeout_s), PushReceived):
                pass
            worker.read_gradient(gradient)
            total += gradient[0]
            worker.send(WorkMessage(MessageKind.APPLIED, 0))
            worker.receive_push()
        worker.send(WorkMessage(MessageKind.FINISHED))

    return run_ranks(2, rank_main)[0]


@pytest.mark.parametrize("has_feedback", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_off_by_half_a_step_at_most(dtype: torch.dtype, has_feedback: bool) -> None:
    sent = gradient(dtype)
    came = pushed(sent, Quantization("int8", BLOCK, has_feedback), dtype)
    rounding = sent.abs().double() * 2.0**-8 if dtype is torch.bfloat16 else 0.0
    assert ((came - sent.double()).abs() <= half_a_step(sent) + rounding).all()


@pytest.mark.parametrize("kind", ["int8", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_rounding_takes_comes_later(dtype: torch.dtype, kind: str) -> None:
    """The sum of ten pushes is off by what one rounding takes, not by what ten do. It is looked at
    before the server rounds it to the numbers of its model."""
    sent, count = gradient(dtype), 10
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    came = pushed(sent, Quantization(kind, BLOCK), wide, count)
    once = half_a_step(sent) if kind == "int8" else sent.abs().double() * 2.0**-8
    assert ((came - count * sent.double()).abs() <= 1.02 * once + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_they_are_numbers_keep_their_bytes(dtype: torch.dtype) -> None:
    sent = gradient(dtype)
    assert torch.equal(pushed(sent, Quantization(), dtype), sent.double())


def computed(budget: WaitBudget, begin_s: float, push_s: float) -> None:
    budget.start_item(begin_s)
    budget.push(push_s)


def test_a_wait_ends_when_the_weights_arrive() -> None:
    budget = WaitBudget(0.5)
    assert budget.remaining_s(10.0) == 0, "nothing is outstanding"
    computed(budget, 10.0, 12.0)
    assert budget.remaining_s(12.0) == pytest.approx(1.0)
    assert budget.remaining_s(12.75) == pytest.approx(0.25)
    budget.weights_arrived(12.75)
    assert budget.remaining_s(12.75) == 0


def test_no_wait_after_a_long_round_trip() -> None:
    budget = WaitBudget(0.5)
    computed(budget, 0.0, 2.0)
    assert budget.remaining_s(3.5) == 0
    budget.start_item(3.5)
    budget.weights_arrived(4.5)  # 2.5 s, more than half of 2 s
    budget.push(5.5)
    assert budget.remaining_s(5.5) == 0


def test_waits_again_after_a_short_round_trip() -> None:
    budget = WaitBudget(0.5)
    computed(budget, 0.0, 2.0)
    budget.weights_arrived(4.0)
    computed(budget, 4.0, 6.0)
    assert budget.remaining_s(6.0) == 0
    budget.weights_arrived(6.5)  # in the background, and quick
    computed(budget, 6.0, 8.0)
    assert budget.remaining_s(8.0) == pytest.approx(1.0)


def test_an_outstanding_push_counts_as_a_long_round_trip() -> None:
    budget = WaitBudget(0.5)
    computed(budget, 0.0, 2.0)
    computed(budget, 3.0, 5.0)
    assert budget.remaining_s(5.0) == 0


def test_a_fraction_of_zero_never_waits() -> None:
    budget = WaitBudget(0.0)
    computed(budget, 0.0, 2.0)
    assert budget.remaining_s(2.0) == 0


def test_weights_without_a_push_change_nothing() -> None:
    budget = WaitBudget(0.5)
    budget.weights_arrived(7.0)  # weights that were sent without a push
    computed(budget, 7.0, 9.0)
    assert budget.remaining_s(9.0) == pytest.approx(1.0)
