"""Spans of a few steps: what is in them, and that all ranks share one zero."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.algorithms.classicdp import ClassicDP
from smolrun.data.splits import Batch
from smolrun.events import Event, Timeline
from smolrun.mesh.mesh import Mesh
from smolrun.parts.precision import PRECISIONS
from smolrun.testing import run_ranks
from smolrun.training.optimizer import make_optimizer
from smolrun.training.timeline import FIRST_STEP, TimelineRecorder
from smolrun.training.trainer import TrainOutcome
from tests.waiting import SOON_S

SLOW_S = 0.05


class SlowOnRank1(ClassicDP):
    """Rank 1 computes until rank 0 `waits` for it in the same step, and for SLOW_S more."""

    steps = 0
    waits: Sequence[threading.Event] = ()

    def forward_backward(self, micro_batches: list[Batch]) -> dict[str, float]:  # type: ignore[override]
        self.steps += 1
        if self.context.mesh.rank == 1:
            if self.waits:
                self.waits[self.steps].wait(SOON_S)
            time.sleep(SLOW_S)
        return super().forward_backward(micro_batches)

    def wait_for(self, pending: PendingUpdate) -> None:
        if self.waits and self.context.mesh.rank == 0:
            self.waits[self.steps].set()
        super().wait_for(pending)


def algorithm(mesh: Mesh, staleness: int = 0) -> SlowOnRank1:
    context = Context(
        mesh=mesh,
        device=torch.device("cpu"),
        precision=PRECISIONS["float32"],
        make_optimizer=functools.partial(make_optimizer, name="sgd", lr=0.1, weight_decay=0.0),
        learning_rate=lambda _: 0.1,
        staleness=staleness,
    )
    made = SlowOnRank1(context, bucket_mb=1.0)
    model = torch.nn.Linear(4, 3)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    made.place(model)
    return made


BATCH = Batch(torch.arange(8.0).view(2, 4), torch.tensor([0, 1]))


def record(
    mesh: Mesh,
    steps: int,
    wanted: int,
    staleness: int = 0,
    waits: Sequence[threading.Event] = (),
) -> tuple[list[Event], Algorithm, float]:
    """The events, the algorithm, and the zero of this rank's spans."""
    made, events = algorithm(mesh, staleness), list[Event]()
    made.waits = waits
    recorder = TimelineRecorder(made, wanted, steps, events.append)
    for step in range(steps):
        recorder.before_step(step)
        made.train_step([BATCH])
    recorder.after_training(TrainOutcome())
    made.drain()
    made.collectives.barrier()
    return events, made, recorder._zero_s


def spans(event: Event, lane: str) -> list[tuple[str, int, float, float]]:
    assert isinstance(event, Timeline)
    return [(what, step, a, a + d) for what, in_lane, step, a, d in event.spans if in_lane == lane]


def test_steps_after_the_warm_up_are_recorded_with_a_common_zero() -> None:
    waits_of_0 = [threading.Event() for _ in range(13)]
    recorded = run_ranks(2, lambda mesh: record(mesh, 12, 3, waits=waits_of_0), kind="tcp")
    for rank, (events, made, _) in enumerate(recorded):
        (event,) = events
        assert isinstance(event, Timeline)
        assert (event.step, event.rank) == (FIRST_STEP, rank)
        computed = [what for what, *_ in spans(event, "compute") if what == "forward_backward"]
        assert len(computed) == 3
        assert {step for _, step, _, _ in spans(event, "compute")} == {5, 6, 7}
        assert made.clock.on_span is None
    (fast,), (slow,) = recorded[0][0], recorded[1][0]
    waits = [span for span in spans(fast, "wait") if span[0].startswith("all_reduce")]
    works = [span for span in spans(slow, "compute") if span[0] == "forward_backward"]
    apart = recorded[1][2] - recorded[0][2]  # of their zeros, on the one clock of this process
    for (_, _, begins, ends), (_, _, works_from, works_to) in zip(waits, works, strict=True):
        assert works_to - works_from >= SLOW_S
        assert ends - begins >= SLOW_S, "rank 0 waits for rank 1"
        assert ends >= works_from + apart + SLOW_S, "until that one sends, in its backward pass"
    for (_, _, _, ends), (_, _, _, next_to) in zip(waits, works[1:], strict=False):
        assert ends <= next_to + apart - SLOW_S, "and no longer"
    travels = [span for span in spans(fast, "network") if span[0].startswith("all_reduce")]
    assert len(travels) == 3
    assert all(begins >= 0 for _, _, begins, _ in travels)


def test_a_short_run_records_its_last_steps() -> None:
    for steps, wanted, expected in ((4, 3, 1), (2, 5, 0)):
        events, *_ = run_ranks(1, lambda mesh, s=steps, w=wanted: record(mesh, s, w))[0]
        (event,) = events
        assert isinstance(event, Timeline)
        assert event.step == expected
    assert run_ranks(1, lambda mesh: record(mesh, 8, 0))[0][0] == []


def test_stale_gradients_have_no_negative_times() -> None:
    (events, *_), _ = run_ranks(2, lambda mesh: record(mesh, 10, 3, staleness=1), kind="tcp")
    (event,) = events
    assert all(begins >= 0 for lane in ("compute", "wait", "network")
               for _, _, begins, _ in spans(event, lane))  # fmt: skip


def test_a_long_recording_ends_before_it_is_too_long_to_send(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("smolrun.training.timeline._MOST_SPANS", 5)
    (event,) = run_ranks(1, lambda mesh: record(mesh, 30, 20))[0][0]
    assert isinstance(event, Timeline)
    assert 5 <= len(event.spans) < 15, "the rest of the step that reached it, and no further step"
