"""What a worker pushes is what the server takes, whatever numbers the model has."""

from __future__ import annotations

import queue

import pytest
import torch
from torch import Tensor

from smolrun.mesh.mesh import Mesh
from smolrun.parts.courier import Courier
from smolrun.parts.flat_model import FlatModel
from smolrun.parts.patience import Patience
from smolrun.parts.push_pull import Facts, Letter, Word
from smolrun.parts.quantization import Quantization
from smolrun.parts.worker_at_server import Happening, Pushed, Worker
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
    """The same gradient `count` times, one after the other; returns the sum of what came."""

    def rank_main(mesh: Mesh) -> Tensor:
        model = FlatModel([torch.nn.Parameter(torch.zeros_like(sent))])
        total = torch.zeros(len(sent), dtype=torch.float64)
        if mesh.rank == 0:
            serve(mesh, model, total)
        else:
            courier = Courier(mesh, 0, model, quantization, Patience(0.0))
            while ticket := courier.next_ticket():
                courier.push(Facts(ticket.number, 0, 0.0, 1.0, 1.0, 0.0), [sent])
        return total

    def serve(mesh: Mesh, model: FlatModel, total: Tensor) -> None:
        happenings: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        worker = Worker(mesh, 1, model, quantization, happenings)
        worker.begin()
        worker.send_if_due(0)
        taken = [torch.zeros(len(sent), dtype=into)]
        for number in range(count):
            worker.say(Letter(Word.TICKET, number, 0, count))
            while not isinstance(happenings.get(timeout=mesh.timeout_s), Pushed):
                pass
            worker.take_gradient(taken)
            total += taken[0]
            worker.say(Letter(Word.APPLIED, 0))
            worker.expect_push()
        worker.say(Letter(Word.OVER))

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
