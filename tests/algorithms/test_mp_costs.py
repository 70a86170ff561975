"""What a stage holds and sends, against the formulas of docs/algorithms/mp_pipeline.md."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from smolrun.algorithms.mp import ModelParallel
from smolrun.algorithms.mp_pipeline import mp_pipeline
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Mesh
from smolrun.models.shape import parameter_shapes
from smolrun.testing import run_ranks
from tests.algorithms.test_fsdp_costs import GPT_NARROW, context_of, decoder, held

STAGES, MICRO_BATCHES = 3, 4
SHAPE = (2, 64)  # sequences and tokens of a micro-batch
HOP = math.prod(SHAPE) * GPT_NARROW["width"] * 4
KEYS: dict[str, Any] = {"schedule": "1f1b", "micro_batches": MICRO_BATCHES, "layers": None}
KEYS |= {"replicas": 1}


def placed(mesh: Mesh, algorithm: str, **keys: Any) -> ModelParallel:
    context = context_of(mesh)
    made: Any
    if algorithm == "mp_pipeline":
        made = mp_pipeline(context, **{**KEYS, **keys})
    else:
        made = ModelParallel(context, layers=None)
    made.place(decoder(**GPT_NARROW, max_sequence_length=SHAPE[1]))
    return made


def step(algorithm: ModelParallel) -> None:
    tokens = torch.randint(512, SHAPE, generator=torch.Generator().manual_seed(0))
    algorithm.train_step([Batch(tokens, tokens.roll(-1, 1))] * MICRO_BATCHES)


@pytest.mark.parametrize("algorithm", ["mp", "mp_pipeline"])
def test_bytes_of_a_step_are_those_of_the_hops(algorithm: str) -> None:
    """In each direction of a link, hidden states or their gradients; the ends share a matrix."""

    def rank_main(mesh: Mesh) -> int:
        made = placed(mesh, algorithm)
        step(made)
        made.collectives.barrier()
        before = mesh.bytes_sent
        made.collectives.barrier()  # nobody sends before all have looked
        step(made)
        made.collectives.barrier()
        return mesh.bytes_sent - before

    tied = 512 * GPT_NARROW["width"] * 4
    expected = [MICRO_BATCHES * HOP + tied, 2 * MICRO_BATCHES * HOP, MICRO_BATCHES * HOP + tied]
    for rank, sent in enumerate(run_ranks(STAGES, rank_main, kind="tcp")):
        print(f"{algorithm}, rank {rank}: {sent / expected[rank]:.4f} of the formula")
        assert expected[rank] <= sent <= 1.02 * expected[rank]


@pytest.mark.parametrize("algorithm", ["mp", "mp_pipeline"])
def test_bytes_of_the_parameters_of_a_stage(algorithm: str) -> None:
    """Weights, gradients and the optimizer of its own layers, its end of the model included;
    of the embedding, the last stage has values, a gradient, and memory for the new values."""

    def rank_main(mesh: Mesh) -> float:
        made = placed(mesh, algorithm)
        step(made)
        shapes = parameter_shapes(
            made.model.shape,
            512,
            made.layers.start,
            made.layers.stop - 1,
            made.is_first,
            made.is_last,
        )
        copied = 4 * 512 * GPT_NARROW["width"] if made.is_last else 0
        return (held(made) + copied) / sum(map(math.prod, shapes.values()))

    for rank, per_parameter in enumerate(run_ranks(STAGES, rank_main)):
        print(f"{algorithm}, rank {rank}: {per_parameter:.2f} bytes a parameter")
        assert per_parameter == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize(("schedule", "most"), [("1f1b", [3, 2, 1]), ("gpipe", [4, 4, 4])])
def test_micro_batches_whose_activations_a_stage_holds(schedule: str, most: list[int]) -> None:
    def rank_main(mesh: Mesh) -> int:
        made: Any = placed(mesh, "mp_pipeline", schedule=schedule)
        seen: list[int] = []
        backward = made.run_backward

        def counted(*args: Any) -> Any:
            seen.append(len(made.open) + 1)  # and the one that goes backward now
            return backward(*args)

        made.run_backward = counted
        step(made)
        return max(seen)

    assert run_ranks(STAGES, rank_main) == most
