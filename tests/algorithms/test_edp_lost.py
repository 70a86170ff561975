"""What is lost or hurt in an edp run: workers that die at awkward moments, gradients that are not
finite. Nothing is computed twice or never, and the log still says what happened."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smolrun.algorithms.edp.server import EDPServer
from smolrun.data.splits import Batch
from smolrun.errors import CheckpointError
from smolrun.events import PushDropped
from smolrun.testing import run_ranks
from tests.algorithms import parameter_server as ps
from tests.algorithms.crew import crew
from tests.algorithms.test_edp import assert_is_its_log, holds, num_done, run
from tests.waiting import until


def test_a_worker_that_dies_and_returns_while_the_server_is_busy() -> None:
    """What the server still does for the process before it must not reach the new one."""
    with crew(3, 1, 2, steps=12) as made:
        made.begin(0, gate=3)
        made.begin(1)
        made.begin(2)
        # Three batches are done, and everybody has used up what the server gave; it does not look.
        until(lambda: made.begun[0] == 3 and num_done(made) == 6)
        until(lambda: made.algorithms[1].client._in_flight is not None)  # type: ignore[attr-defined]
        made.kill(1)
        until(lambda: 1 in made.ended)
        made.join(1)
        made.gates.clear()
        seen = made.server()
    assert sorted(push.ticket for push in seen.pushes) == list(range(24))
    assert_is_its_log(seen, "mlp", 2)


def test_a_server_that_trains_takes_back_what_the_last_worker_had() -> None:
    with crew(2, 1, steps=100, keys={"server_trains": True}) as made:
        made.begin(1, gate=0)  # it takes items and does not compute them
        made.begin(0, gate=0)

        def has_some() -> bool:
            made.gates[0].release()
            return bool(holds(made, 1))

        until(has_some)
        made.gates.pop(0)
        until(lambda: num_done(made) + len(holds(made, 1)) == 200)
        assert holds(made, 1)
        made.kill(1)
        seen = made.server()
    assert sorted(push.ticket for push in seen.pushes) == list(range(200))


def hurt(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """Makes the samples of item 4 of 20 infinite, so many times."""
    real, left = ps.samples, [times]

    def samples(model: str, step: int, index: int, count: int) -> Batch:
        batch = real(model, step, index, count)
        if (step, index) != (2, 0) or left[0] == 0:
            return batch
        left[0] -= 1
        return Batch(batch.inputs * math.inf, batch.targets)

    monkeypatch.setattr(ps, "samples", samples)


def test_a_gradient_that_is_not_finite_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hurt(monkeypatch, 1)
    seen = run(3, "mlp")
    dropped = [event for event in seen[0].events if isinstance(event, PushDropped)]
    assert [(event.ticket, event.reason) for event in dropped] == [(4, "it was not finite")]
    skipped = [result for one in seen[1:] for result in one.results if result.grad_norm is None]
    assert [result.nonfinite_ranks for result in skipped] == [(dropped[0].rank,)]
    assert sorted(push.ticket for push in seen[0].pushes) == list(range(20))
    assert all(push.grad_norm is not None for push in seen[0].pushes)


def test_a_gradient_that_is_never_finite_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    hurt(monkeypatch, math.inf)
    seen = run(3, "mlp")[0]
    assert sorted(push.ticket for push in seen.pushes) == list(range(20))
    (bad,) = [push for push in seen.pushes if push.grad_norm is None]
    assert (bad.ticket, bad.samples) == (4, 0)
    dropped = [event for event in seen.events if isinstance(event, PushDropped)]
    assert Counter(event.reason for event in dropped) == {"it was not finite": 3}
    (where,) = [result for result in seen.results if result.nonfinite_ranks]
    assert where.step == bad.step and where.nonfinite_ranks == (bad.rank,)


def test_an_item_that_takes_longer_than_the_timeout_fails_no_rank() -> None:
    """A worker measures the server's silence from when it began to wait for it."""
    with crew(3, 1, 2, steps=8, keys={"wait_fraction": 1e6}) as made:
        made.begin(0)
        until(lambda: 0 in made.algorithms)
        made.begin(1, gate=0)
        until(lambda: 1 in made.algorithms)
        worker: Any = made.algorithms[1]
        train_step = worker.train_step

        def slow(micro_batches: Any) -> Any:
            result = train_step(micro_batches)
            worker.client._last_message_s = -1e9
            return result

        worker.train_step = slow
        made.begin(2)
        made.gates.clear()
        made.server()
        until(lambda: 1 in made.seen or 1 in made.ended)
        assert 1 not in made.ended


def test_gradients_in_flight_are_refused_with_what_to_do() -> None:
    def rank_main(mesh: Any) -> str:
        server = ps.place(mesh, ps.start("mlp"))
        assert isinstance(server, EDPServer)
        state = {**server.state(), "in_flight": [3]}
        with pytest.raises(CheckpointError) as caught:
            server.restore(SimpleNamespace(folder=Path("step-00000003")), state)  # type: ignore[arg-type]
        return str(caught.value)

    (told,) = run_ranks(1, rank_main)
    assert "resume with its own algorithm" in told and "step-00000003" in told
