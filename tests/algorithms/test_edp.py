"""edp is what its log of arrivals says, whoever comes and goes."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch

from smolrun.algorithms.contract import UPDATE
from smolrun.algorithms.edp.server import EDPServer
from smolrun.events import Membership, PushDropped
from smolrun.mesh.mesh import Mesh
from smolrun.parts.quantization import Quantization
from smolrun.testing import run_ranks
from tests.algorithms import parameter_server as ps
from tests.algorithms import worlds
from tests.algorithms.crew import Crew, crew
from tests.waiting import until


def run(
    world_size: int, model: str, *, kind: str = "memory", steps: int = 10, **place: Any
) -> list[ps.Seen]:
    net = ps.start(model, place.get("precision", "float64"))

    def rank_main(mesh: Mesh) -> ps.Seen:
        if mesh.rank == 0:  # else a server that trains may be done before anybody has come
            until(lambda: len(mesh.present) == world_size - 1)
        return ps.fit(ps.place(mesh, net, **place), model, steps)

    return run_ranks(world_size, rank_main, kind=kind, elastic=True)


def assert_is_its_log(seen: ps.Seen, model: str, per_step: int, **how: Any) -> None:
    """Byte for byte what one process gets that does what the log says."""
    again = ps.replay(model, seen.pushes, per_step, **how)
    for name, value in again.items():
        assert torch.equal(value, seen.parameters[name]), name


@pytest.mark.parametrize("kind", ["memory", "tcp"])
@pytest.mark.parametrize(("precision", "optimizer"), [("float64", "sgd"), ("float32", "adamw")])
@pytest.mark.parametrize("model", worlds.MODELS)
@pytest.mark.parametrize(("world_size", "server_trains"), [(2, False), (4, False), (3, True)])
def test_a_replay_of_the_log_gives_the_same_bytes(
    world_size: int, server_trains: bool, model: str, precision: str, optimizer: str, kind: str
) -> None:
    how: dict[str, Any] = {"precision": precision, "optimizer": optimizer}
    seen = run(world_size, model, kind=kind, keys={"server_trains": server_trains}, **how)
    per_step = world_size - 1 + server_trains
    pushes = seen[0].pushes
    assert sorted(push.ticket for push in pushes) == list(range(10 * per_step))
    assert [push.age for push in pushes] == [n - push.version for n, push in enumerate(pushes)]
    assert sum(push.samples for push in pushes) == 10 * worlds.GLOBAL_BATCH
    assert [result.step for result in seen[0].results] == list(range(10))
    assert_is_its_log(seen[0], model, per_step, **how)


def test_random_draws_depend_on_the_work_item_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worlds.MODELS, "noisy", worlds.Noisy)
    seen = run(3, "noisy", more={"reseed": worlds.reseed})[0]
    assert_is_its_log(seen, "noisy", 2)


def test_every_update_is_seeded_from_its_number() -> None:
    words: list[tuple[int, ...]] = []
    seen = run(3, "mlp", steps=3, more={"reseed": lambda *found: words.append(found)})
    updates = [number for kind, number in words if kind == UPDATE]
    assert updates == list(range(len(seen[0].pushes)))


def test_the_replay_can_tell_another_order() -> None:
    """A negative control."""
    seen = run(4, "mlp")[0]
    pushes = seen.pushes
    late = next(n for n, push in enumerate(pushes) if push.version)
    pushes[late] = msgspec.structs.replace(pushes[late], version=pushes[late].version - 1)
    again = ps.replay("mlp", pushes, 3)
    assert any(not torch.equal(again[name], seen.parameters[name]) for name in again)


@pytest.mark.parametrize("lr_scale", ["none", "inverse_sqrt"])
def test_staleness_lr_scale_by_name(lr_scale: str) -> None:
    seen = run(3, "mlp", keys={"staleness_lr_scale": lr_scale})[0]
    assert max(push.age for push in seen.pushes) > 0
    assert_is_its_log(seen, "mlp", 2, lr_scale=lr_scale)


def test_more_parts_than_workers() -> None:
    seen = run(3, "language_model", keys={"pushes_per_batch": 5})[0]
    assert len(seen.pushes) == 50
    assert_is_its_log(seen, "language_model", 5)


def test_alone_it_is_single() -> None:
    single = worlds.train("single", "language_model", 1, micro_batch_size=None)[0]
    (seen,) = run(1, "language_model")
    for name, value in single.parameters.items():
        assert torch.allclose(value, seen.parameters[name], rtol=0, atol=1e-12)
    assert [result.loss for result in seen.results] == pytest.approx(single.losses, abs=1e-12)
    assert all(push.age == 0 for push in seen.pushes)


@pytest.mark.parametrize("bound", [0, 1, 2, None])
def test_a_fast_rank_stops_at_the_bound_and_not_without_one(bound: int | None) -> None:
    """No item of step s is trained with weights that lack an update of a step before s - K, so no
    gradient is older than (2K + 1) m - 1 updates."""
    with crew(3, 1, 2, steps=8, more={"staleness_bound": bound}) as made:
        made.begin(0)
        made.begin(1, gate=0)  # it will not push what it has
        wanted = 2 if bound is None else bound + 1
        until(lambda: len(holds(made, 1)) == min(wanted, 2))
        made.begin(2)
        room = 16 if bound is None else 2 * (bound + 1)
        until(lambda: num_done(made) == room - len(holds(made, 1)) - len(holds(made, 2)))
        until(lambda: bound is None or made.begun[2] == num_done(made))
        made.gates.pop(1)
        pushes = made.server().pushes
    assert sorted(push.ticket for push in pushes) == list(range(16))
    done_at = {push.ticket: n for n, push in enumerate(pushes)}
    for push in pushes if bound is not None else []:
        before = max(0, push.ticket // 2 - (bound or 0)) * 2
        assert all(done_at[item] < push.version for item in range(before))
        assert push.age <= (2 * (bound or 0) + 1) * 2 - 1


def holds(made: Crew, rank: int) -> list[int]:
    server = made.algorithms[0]
    assert isinstance(server, EDPServer)
    return server.work_queue.held_by(rank)


def num_done(made: Crew) -> int:
    server = made.algorithms[0]
    assert isinstance(server, EDPServer)
    return server.work_queue.num_done


def test_ranks_come_late_die_return_and_leave() -> None:
    with crew(4, 1, steps=40) as made:
        made.begin(0)
        made.begin(1, gate=6)
        until(lambda: num_done(made) >= 4)
        made.join(2)  # late
        until(lambda: made.begun[2] >= 5)
        made.gates[2] = made.gates[1]  # both stop where they are
        until(lambda: len(holds(made, 1)) > 0)
        made.kill(1)
        until(lambda: 1 in made.ended)
        made.join(1)  # comes back
        made.join(3)
        made.gates.clear()
        seen = made.server()
    assert sorted(push.ticket for push in seen.pushes) == list(range(120))
    assert {push.rank for push in seen.pushes} == {1, 2, 3}
    dropped = [event for event in seen.events if isinstance(event, PushDropped)]
    assert {event.rank for event in dropped if event.reason == "its rank is gone"} == {1}
    told = [event for event in seen.events if isinstance(event, Membership)]
    gone = [event for event in told if not event.is_here]
    assert [(event.rank, event.reason, event.tickets) for event in gone] == [
        (1, "it was killed", len(dropped))
    ]
    assert Counter(event.rank for event in told if event.is_here) == {1: 2, 2: 1, 3: 1}
    assert_is_its_log(seen, "mlp", 3)


def test_a_newer_push_replaces_a_waiting_one() -> None:
    """Nothing is lost: the item is returned and computed again."""
    with crew(2, 1, steps=30) as made:
        made.begin(0)
        until(lambda: 0 in made.algorithms)
        server = made.algorithms[0]
        complete = server.server.complete  # type: ignore[attr-defined]
        begun = [0]

        def slowly(push: Any) -> None:
            begun[0] += 1
            if begun[0] in (3, 9):  # the network is slow: meanwhile the worker has three more
                goal = made.begun[1] + 3
                while made.begun[1] < goal and server.server.next_push(0.005) is None:  # type: ignore[attr-defined]
                    pass
            complete(push)

        server.server.complete = slowly  # type: ignore[attr-defined]
        made.begin(1)
        seen = made.server()
    dropped = [event for event in seen.events if isinstance(event, PushDropped)]
    assert {event.reason for event in dropped} == {"a newer one took its place"}
    assert sorted(push.ticket for push in seen.pushes) == list(range(30))
    assert_is_its_log(seen, "mlp", 1)


def test_a_stop_reaches_all_and_goes_on_later() -> None:
    """The bytes of both halves are what both logs say."""
    saved: dict[str, Any] = {}
    with crew(3, 1, 2, steps=10) as made:
        made.begin(0)
        made.begin(1, gate=3)
        made.begin(2, gate=3)
        until(lambda: num_done(made) >= 3)
        made.algorithms[0].wants_stop = True
        made.gates.clear()
        first = made.server()
        until(lambda: {1, 2} <= set(made.seen))
        server = made.algorithms[0]
        saved = {
            "model": copy.deepcopy(server.model.state_dict()),
            "optimizer": copy.deepcopy(server.optimizer.state_dict()),
            "state": server.state(),
        }
        assert all(made.algorithms[rank].steps_begun < 10 for rank in (0, 1, 2))
    assert saved["state"]["tickets"]["open"], "items that were held"

    def resume(algorithm: Any) -> None:
        algorithm.model.load_state_dict(saved["model"])
        algorithm.optimizer.load_state_dict(saved["optimizer"])
        algorithm.steps_begun = saved["state"]["steps_begun"]
        algorithm.work_queue.restore(saved["state"]["tickets"])

    with crew(4, 1, 2, 3, steps=10) as made:  # with one more: steps stay cut in two
        made.begin(0, resume=resume)
        for rank in (1, 2, 3):
            made.begin(rank)
        second = made.server()
    pushes = [*first.pushes, *second.pushes]
    assert sorted(push.ticket for push in pushes) == list(range(20))
    seen = ps.Seen([*first.results, *second.results], second.parameters)
    assert_is_its_log(seen, "mlp", 2)


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_gradients_in_fewer_bits_still_train(kind: str) -> None:
    def losses(quantization: Quantization) -> list[float]:
        more = {
            "quantization": quantization,
            "make_optimizer": functools.partial(ps.make_sgd, lr=0.1),
            "learning_rate": lambda step: 0.1,
            "grad_clip": 0.0,
        }
        return [r.loss for r in run(2, "mlp", steps=30, precision="float32", more=more)[0].results]

    few, all_bits = losses(Quantization(kind)), losses(Quantization())
    assert sum(few[-5:]) == pytest.approx(sum(all_bits[-5:]), rel=0.05)
    assert few != all_bits


def test_fp16_scales_its_loss_at_the_worker() -> None:
    seen = run(3, "mlp", precision="fp16", optimizer="adamw")[0]
    assert all(math.isfinite(result.loss) for result in seen.results)
    assert sorted(push.ticket for push in seen.pushes) == list(range(20))
