"""What each bench measures on a rank: its rows, one after the other. Only wiring."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.mp import ModelParallel
from smolrun.benchmarks.collectives import compare_all_reduce, compare_link
from smolrun.benchmarks.pipeline import PacedPipeline, compare_cuts, compare_schedules
from smolrun.benchmarks.serving import compare_serving
from smolrun.benchmarks.step import PeerStep, PipeliningStep, compare_step
from smolrun.benchmarks.stragglers import compare_bounds, compare_edp, compare_shares
from smolrun.collectives.api import Collectives
from smolrun.data.order import SampleOrder
from smolrun.data.prepared import Prepared
from smolrun.data.splits import open_split
from smolrun.errors import PeerLost
from smolrun.launch.control import StartMessage
from smolrun.mesh.mesh import Mesh
from smolrun.models.base import StagedModel
from smolrun.parts.placement import plan_batches
from smolrun.training.loader import BatchLoader
from smolrun.worker.train import new_model, optimizer_maker, place_algorithm


def rows(start: StartMessage, mesh: Mesh, collectives: Collectives) -> Iterable[dict[str, Any]]:
    """The rows of the bench that the configuration asks for; collective."""
    bench = start.config["bench"]
    security = "tls" if start.security == "tls" else "plain"
    match bench["name"]:
        case "collectives":
            return compare_all_reduce(
                collectives, bench["sizes"], repeats=bench["repeats"], security=security
            )
        case "link":
            return compare_link(
                collectives,
                bench["sizes"],
                addresses=start.addresses,
                repeats=bench["repeats"],
                security=security,
                timeout_s=mesh.timeout_s,
            )
        case "unequal":
            return compare_shares(
                mesh,
                bench["speeds"],
                global_batch_size=bench["global_batch_size"],
                sample_s=bench["sample_ms"] / 1000,
                steps=bench["steps"],
                warm_up=bench["warmup_steps"],
                repeats=bench["repeats"],
            )
        case "pipeline":
            return _pipelines(mesh, bench)
        case "stragglers":
            return _straggling(mesh, bench)
        case "serving":
            keys = ("dtype", "layers", "streams", "prompt_tokens", "new_tokens", "repeats", "peers")
            return compare_serving(mesh, **{key: bench[key] for key in keys})
    return ({**row, "security": security} for row in _steps(start, mesh))


def end_together(collectives: Collectives) -> None:
    """Blocks until every rank has its rows.

    A worker of edp that gets through first may leave while others are still in the barrier. The
    server has receives from it posted, always, and so takes it for lost; the rows are complete."""
    with contextlib.suppress(PeerLost):
        collectives.barrier()


def _straggling(mesh: Mesh, bench: dict[str, Any]) -> Iterator[dict[str, Any]]:
    given = {key: bench[key] for key in ("steps", "chance", "factor", "repeats")}
    given["step_s"] = bench["step_ms"] / 1000
    yield from compare_bounds(mesh, bench["bounds"], **given)
    if bench["edp"]:
        yield compare_edp(mesh, wait_fraction=bench["wait_fraction"], **given)


def _pipelines(mesh: Mesh, bench: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pipeline = PacedPipeline(mesh, bench["layers"], bench["layer_ms"] / 1000)
    given = {"steps": bench["steps"], "repeats": bench["repeats"]}
    schedules = bench["schedules"]
    yield from compare_schedules(pipeline, schedules, micro_batches=bench["micro_batches"], **given)
    yield from compare_cuts(
        pipeline,
        bench["speeds"],
        schedules[-1],
        micro_batches=bench["cut_micro_batches"],
        splits=bench["splits"],
        **given,
    )


def _steps(start: StartMessage, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """One row for every peer; both sides begin anew for each."""
    config, device = start.config, torch.device("cpu")  # gloo's side of the comparison is the CPU
    training, bench = config["training"], config["bench"]
    prepared = Prepared.from_json(start.prepared or {})
    split = open_split(prepared, "train", verify=False)
    order = SampleOrder(len(split), config["seed"])
    for kind in bench["peers"]:
        algorithm = place_algorithm(config, prepared, mesh, device)
        wanted = algorithm.data_coordinates([1.0] * mesh.world_size)
        size = training["global_batch_size"]
        plan = plan_batches(size, wanted.weights, wanted.index, None, wanted.micro_batches)
        yield compare_step(
            algorithm,
            _peer(kind, config, algorithm, new_model(config, prepared, device)),
            BatchLoader(split, order, plan).load,
            steps=bench["steps"],
            warm_up=bench["warmup_steps"],
            repeats=bench["repeats"],
        )


def _peer(
    kind: str, config: dict[str, Any], algorithm: Algorithm, model: torch.nn.Module
) -> PeerStep | PipeliningStep:
    clip, make_optimizer = config["training"]["grad_clip"], optimizer_maker(config)
    if kind != "pipelining":
        return PeerStep(kind, model, make_optimizer, clip)
    assert isinstance(algorithm, ModelParallel) and isinstance(model, StagedModel)
    schedule = config["algorithm"]["schedule"]
    return PipeliningStep(algorithm, model, make_optimizer, schedule=schedule, grad_clip=clip)
