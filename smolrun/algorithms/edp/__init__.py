"""Elastic data parallelism: a parameter server, and workers that never wait for each other.

    rank 1, fast     [i0   ][i2   ][i3   ][i5   ][i6   ]     i0, i1, ...: work items
                           push 0 |  push 2 |  ^ weights
    rank 0, server                [u]      [u]  [u]   [u]     one update per push, as they arrive
                                                 | push 1
    rank 2, slow     [i1                       ][i4          ]

    work_queue.py   which worker computes which part of which global batch; the staleness bound
    protocol.py     what worker and server send to each other
    base.py         what both are: a replica whose gradients are flat tensors
    worker.py       computes gradients; pushes and pulls in the background
    server.py       owns the optimizer; applies pushes, assigns work, sends weights

Rank 0 holds the optimizer. A worker takes a work item, computes the gradient of its samples, pushes
it in the background and continues with the next item, with newer weights if some have arrived; it
waits for weights that contain its own push only while a WaitBudget lasts. So gradients are stale:
the age of one is the number of updates since the weights that it was computed with, and
`staleness_lr_scale` reduces the learning rate by age. Workers may join, leave and rejoin at any
time. Every rank is a group of its own: nothing here is collective.

Source: Dean et al., "Large Scale Distributed Deep Networks", 2012 (Downpour SGD); Ho et al., "More
Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", 2013 (the bound); Zhang
et al., "Staleness-aware Async-SGD for Distributed Deep Learning", 2016 (learning rate by age)."""

from __future__ import annotations

from smolrun.algorithms.base import Algorithm, Context
from smolrun.algorithms.edp.server import EDPServer
from smolrun.algorithms.edp.work_queue import WorkQueue
from smolrun.algorithms.edp.worker import EDPWorker
from smolrun.parts.parameter_server import SERVER


def edp(
    context: Context,
    *,
    server_trains: bool,
    pushes_per_batch: int | str,
    staleness_lr_scale: str,
    wait_fraction: float,
    min_ranks: int,
) -> Algorithm:
    """The server on rank 0, a worker on every other rank; a single rank is a server that trains.
    The driver enforces `min_ranks`."""
    if context.mesh.rank != SERVER:
        return EDPWorker(context, wait_fraction)
    trains = server_trains or context.mesh.world_size == 1
    auto = context.mesh.world_size - 1 + trains
    items_per_step = auto if pushes_per_batch == "auto" else int(pushes_per_batch)
    queue = WorkQueue(items_per_step, context.staleness_bound)
    return EDPServer(context, trains, queue, staleness_lr_scale)
