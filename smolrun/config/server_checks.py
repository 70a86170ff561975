"""Rules about algorithms with a server, as checks.py has them for everything else."""

from __future__ import annotations

from collections.abc import Iterator

from smolrun.config.algorithms import EDP, Algorithm, SyncPS
from smolrun.config.cluster import Cluster
from smolrun.config.data import Data
from smolrun.config.plan import cluster_size
from smolrun.config.settings import Staleness, Training
from smolrun.config.suggest import closest, problem
from smolrun.config.targets import CustomTarget


def server_is_a_host(*, cluster: Cluster, algorithm: Algorithm) -> Iterator[str]:
    """`cluster.server` is one of the hosts, and there is something for a server to do."""
    if cluster.server is None:
        return
    names = [host.name for host in cluster.hosts or []]
    if not isinstance(algorithm, SyncPS | EDP | CustomTarget):
        what = f"algorithm={algorithm.name} has no server"
        yield problem(
            "cluster.server", cluster.server, what, allowed="null, or algorithm=edp, syncps"
        )
    elif cluster.server not in names:
        what = f"no host of cluster={cluster.name}"
        allowed = ", ".join(names) or "null: there are no cluster.hosts"
        meant = closest(cluster.server, names)
        yield problem("cluster.server", cluster.server, what, allowed=allowed, meant=meant)


def somebody_trains(*, cluster: Cluster, algorithm: Algorithm) -> Iterator[str]:
    """A server that does not train needs a worker."""
    if not isinstance(algorithm, SyncPS) or algorithm.server_trains:
        return
    if cluster_size(cluster, algorithm) == 1:
        what = "the server is the only rank"
        yield problem("algorithm.server_trains", False, what, allowed="true, or more cluster.ranks")


def stragglers_can_be_left(
    *, algorithm: Algorithm, staleness: Staleness, training: Training, data: Data, cluster: Cluster
) -> Iterator[str]:
    """A rank that is left behind jumps over steps: what needs every rank at every step cannot be
    had with it."""
    if not isinstance(algorithm, SyncPS) or not algorithm.straggler_s:
        return
    speeds = {host.speed for host in cluster.hosts or []}
    for is_wrong, what, allowed in (
        (
            staleness.bound not in ("auto", 0),
            "with staleness.bound gradients are late on purpose, and none may be dropped",
            "0, or staleness.bound=0",
        ),
        (
            training.check_replicas,
            "a rank that was left behind has older weights than the others",
            "0, or training.check_replicas=false",
        ),
        (
            training.resync_every not in ("auto", 0),
            "all ranks meet to become equal, and a rank that is late waits for its answer instead",
            "0, or training.resync_every=0",
        ),
        (
            getattr(data, "streaming", False),
            "a rank that was left behind jumps over steps, and a stream has no way to do so",
            "0, or data that is no stream",
        ),
        (
            "auto" in speeds,
            "a rank that was left behind does not hear how fast the others are",
            "0, or a number for every cluster.hosts speed",
        ),
    ):
        if is_wrong:
            yield problem("algorithm.straggler_s", algorithm.straggler_s, what, allowed=allowed)


def average_can_be(*, algorithm: Algorithm, precision: str) -> Iterator[str]:
    """Of weights that are there, in numbers that can hold it."""
    if not isinstance(algorithm, SyncPS):
        return
    if algorithm.pull == "average" and not algorithm.polyak:
        what = "algorithm.polyak=0.0 keeps no average"
        yield problem("algorithm.pull", "average", what, allowed="newest, or algorithm.polyak=0.99")
    if algorithm.polyak and precision == "bf16_params":
        what = "an average of small changes needs more digits than bfloat16 has"
        allowed = "0.0, or another precision"
        yield problem("algorithm.polyak", algorithm.polyak, what, allowed=allowed)


def tickets_can_be(*, algorithm: Algorithm, training: Training, data: Data) -> Iterator[str]:
    """Who takes the next part of the data is decided while the run goes on, rank by rank."""
    if not isinstance(algorithm, EDP):
        return
    pushes = algorithm.pushes_per_batch
    if getattr(data, "streaming", False):
        what = "a stream is asked for rows ahead, and with edp nobody knows yet who needs which"
        yield problem("data.streaming", True, what, allowed="false, or algorithm=classicdp")
    if training.check_replicas:
        what = "the ranks of edp have weights of different age, so no two need be equal"
        yield problem("training.check_replicas", True, what, allowed="false")
    if pushes != "auto" and pushes > training.global_batch_size:
        allowed = f"auto, or 1 to training.global_batch_size = {training.global_batch_size}"
        yield problem(
            "algorithm.pushes_per_batch", pushes, "parts without samples", allowed=allowed
        )


def ranks_can_be_enough(*, cluster: Cluster, algorithm: Algorithm) -> Iterator[str]:
    """Ranks that do not exist cannot be waited for. One rank may have the 2 that are shipped."""
    if not isinstance(algorithm, EDP):
        return
    least, size = algorithm.min_ranks, cluster_size(cluster, algorithm)
    if least > max(size, 2):
        what = "the run has only one rank" if size == 1 else f"the run has only {size} ranks"
        more = "ranks in cluster.hosts" if cluster.hosts is not None else "cluster.ranks"
        allowed = f"1 to {max(size, 2)}, or more {more}"
        yield problem("algorithm.min_ranks", least, what, allowed=allowed)


CHECKS = (
    server_is_a_host,
    somebody_trains,
    stragglers_can_be_left,
    average_can_be,
    tickets_can_be,
    ranks_can_be_enough,
)
