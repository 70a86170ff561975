"""Tensors between stages: in order, both ways at once, with the bytes that their shapes say."""

from __future__ import annotations

import pytest
import torch

from smolrun.errors import WaitTimeout
from smolrun.mesh.mesh import Mesh
from smolrun.parts.quantization import NO_QUANTIZATION, Quantization
from smolrun.parts.stage_links import ACTIVATIONS, GRADIENTS, StageLinks
from smolrun.parts.step_clock import StepClock
from smolrun.testing import run_ranks

SHAPE = (4, 64, 256)


def links_of(mesh: Mesh, quantization: Quantization = NO_QUANTIZATION) -> StageLinks:
    return StageLinks(mesh, StepClock(), torch.float32, quantization)


@pytest.mark.parametrize("kind", ["memory", "tcp"])
def test_each_kind_arrives_in_its_order_whatever_is_posted_first(kind: str) -> None:
    def rank_main(mesh: Mesh) -> list[float]:
        links, other = links_of(mesh), 1 - mesh.rank
        kinds = (ACTIVATIONS, GRADIENTS) if mesh.rank else (GRADIENTS, ACTIVATIONS)
        pending = {it: [links.post(it, other, SHAPE) for _ in range(2)] for it in kinds}
        for number in range(2):
            links.send(ACTIVATIONS, other, torch.full(SHAPE, 10.0 + number))
            links.send(GRADIENTS, other, torch.full(SHAPE, 20.0 + number))
        arrived = [links.take(it) for it in pending[ACTIVATIONS] + pending[GRADIENTS]]
        links.finish()
        return [tensor.mean().item() for tensor in arrived if tensor is not None]

    assert run_ranks(2, rank_main, kind=kind) == [[10.0, 11.0, 20.0, 21.0]] * 2


@pytest.mark.parametrize(
    ("kind", "per_number"), [("none", 4.0), ("bf16", 2.0), ("int8", 1 + 4 / 256)]
)
def test_bytes_are_what_the_shape_says(kind: str, per_number: float) -> None:
    def rank_main(mesh: Mesh) -> int:
        links, before = links_of(mesh, Quantization(kind)), mesh.bytes_sent
        if mesh.rank == 0:
            links.send(ACTIVATIONS, 1, torch.ones(SHAPE))
        else:
            links.take(links.post(ACTIVATIONS, 0, SHAPE))
        links.finish()
        return mesh.bytes_sent - before

    expected = per_number * 4 * 64 * 256
    assert expected <= run_ranks(2, rank_main, kind="tcp")[0] <= 1.02 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["memory", "tcp"])
def test_a_plain_tensor_is_sent_and_received_without_a_copy(kind: str, dtype: torch.dtype) -> None:
    """Unless it has to become contiguous."""
    whole = torch.randn(64, 4, 256).to(dtype)

    def rank_main(mesh: Mesh) -> torch.Tensor | None:
        links = StageLinks(mesh, StepClock(), dtype, NO_QUANTIZATION)
        if mesh.rank:
            pending = [links.post(ACTIVATIONS, 0, shape) for shape in (whole.shape, SHAPE)]
            first, second = (links.take(each) for each in pending)
            assert first is pending[0].wire and first is not None and torch.equal(first, whole)
            return second
        sent, send = [], mesh.send
        mesh.send = lambda *args: sent.append(args[-1]) or send(*args)  # type: ignore[method-assign, func-returns-value]
        links.send(ACTIVATIONS, 1, whole)
        links.send(ACTIVATIONS, 1, whole.transpose(0, 1))
        links.finish()
        assert sent[0].data_ptr() == whole.data_ptr() != sent[1].data_ptr()
        return None

    arrived = run_ranks(2, rank_main, kind=kind)[1]
    assert arrived is not None and torch.equal(arrived, whole.transpose(0, 1))


def test_a_stage_that_sends_nothing_is_waited_for_until_a_deadline() -> None:
    def rank_main(mesh: Mesh) -> None:
        if mesh.rank:
            links = links_of(mesh)
            with pytest.raises(WaitTimeout, match="receive from rank 0"):
                links.take(links.post(ACTIVATIONS, 0, SHAPE))

    run_ranks(2, rank_main, timeout_s=0.3)
