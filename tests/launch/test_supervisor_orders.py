"""The driver's decisions under any order of events: always one end, and nobody left running."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.launch.control import ErrorReport, ResultMessage
from smolrun.launch.supervisor_events import (
    Action,
    DriverFailed,
    Exited,
    Finish,
    Input,
    Interrupted,
    Kill,
    NotStarted,
    ProtocolViolation,
    RunOutcome,
    WorkerFinished,
    WorkerReady,
)
from tests.launch.test_supervisor import running, starting, step


def inputs(count: int) -> st.SearchStrategy[Input]:
    rank = st.integers(0, count - 1)
    kinds = st.sampled_from(["PeerLost", "WaitTimeout", "ValueError"])
    error = st.builds(ErrorReport, kinds, st.just("it"), st.none() | st.integers(0, 4))
    status = st.sampled_from(["done", "stopped", "failed"])
    result: Callable[..., ResultMessage] = ResultMessage
    return st.one_of(
        st.builds(WorkerReady, rank, st.just(5000)),
        st.builds(step, rank, st.integers(1, 9)),
        st.builds(WorkerFinished, rank, st.builds(result, status=status, error=st.none() | error)),
        st.builds(Exited, rank, st.sampled_from([0, 3, 75, 131, -9, -11])),
        st.builds(ProtocolViolation, rank, st.just("garbage")),
        st.builds(NotStarted, rank, st.just("no python")),
        st.just(DriverFailed("the network is gone")),
        st.just(Interrupted()),
    )


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_order_of_events_ends_once_with_nobody_left(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    supervisor = starting(count)
    if data.draw(st.booleans()):
        supervisor = running(count)
    obedient = data.draw(st.booleans())  # do killed processes really end?
    now, gone, killed, outcomes = 1.0, set[int](), list[int](), list[RunOutcome]()

    def take(actions: list[Action]) -> None:
        assert not outcomes or not actions, "nothing may follow the finish"
        for action in actions:
            if isinstance(action, Finish):
                outcomes.append(action.outcome)
            elif isinstance(action, Kill):
                assert action.rank not in gone
                killed.append(action.rank)
        for action in actions:
            if isinstance(action, Kill) and obedient and action.rank not in gone:
                gone.add(action.rank)
                take(supervisor.handle(Exited(action.rank, -9), now))

    for item in data.draw(st.lists(inputs(count), max_size=15)):
        now += data.draw(st.sampled_from([0.0, 0.1, 3.0, 70.0, 400.0]))
        if isinstance(item, Exited | NotStarted):
            gone.add(item.rank)
        take(supervisor.handle(item, now))
    for _ in range(20):
        if outcomes:
            break
        if (
            supervisor.deadline is None
        ):  # all are at work, and nothing is wrong: only the user ends that
            take(supervisor.handle(Interrupted(), now))
        else:
            now = max(now, supervisor.deadline)
            take(supervisor.advance(now))
    (outcome,) = outcomes
    assert len(killed) == len(set(killed)), "a rank is killed once"
    assert set(killed) | gone == set(range(count)), "a rank may still be running"
    codes = {"done": {0}, "failed": {3}, "stopped": {130, 131}}
    assert outcome.exit_code in codes[outcome.status]
    reader_failed = outcome.reason.startswith("the network is gone")
    assert (outcome.failed_rank is not None) == (outcome.status == "failed" and not reader_failed)
    assert not reader_failed or outcome.status == "failed"
    assert "\n" not in outcome.reason
    assert supervisor.handle(Interrupted(), now) == []
