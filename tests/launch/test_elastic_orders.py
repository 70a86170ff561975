"""An elastic run under any order of events: always one end, nobody left running, and nobody started
who runs already."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.launch.control import Links
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.supervisor_events import (
    Action,
    Exited,
    Finish,
    Input,
    Interrupted,
    Kill,
    NotStarted,
    PeerReported,
    RestartWorker,
    RunOutcome,
    WorkerReady,
)
from tests.launch.test_elastic import running, starting
from tests.launch.test_regroup import running as running_group
from tests.launch.test_regroup import starting as starting_group
from tests.launch.test_supervisor import at
from tests.launch.test_supervisor_orders import inputs


def news_of_a_group(count: int) -> st.SearchStrategy[Input]:
    rank, generation = st.integers(0, count - 1), st.integers(0, 4)
    return st.one_of(
        st.builds(WorkerReady, rank, st.just(at(5000)), st.just({}), generation),
        st.builds(PeerReported, rank, rank, generation, st.just("silent"), st.none() | rank),
    )


class Processes:
    """What the driver would do: obeys, and knows who lives."""

    def __init__(self, count: int, *, are_obedient: bool, first: int = 1) -> None:
        """`first`: the first rank that may be started again."""
        self._first = first
        self.alive = set(range(count))
        self.killed = set[int]()
        self.outcomes: list[RunOutcome] = []
        self._are_obedient = are_obedient

    def obey(self, actions: list[Action]) -> list[Exited]:
        """Does what is said; the ends that come of it."""
        assert not self.outcomes or not actions, "nothing may follow the finish"
        ended = []
        for action in actions:
            if isinstance(action, Finish):
                self.outcomes.append(action.outcome)
            elif isinstance(action, RestartWorker):
                assert action.rank not in self.alive, "it runs already"
                assert action.rank >= self._first, "rank 0 is never started again"
                self.alive.add(action.rank)
                self.killed.discard(action.rank)
            elif isinstance(action, Kill):
                assert action.rank in self.alive - self.killed, "a process is killed once"
                self.killed.add(action.rank)
                if self._are_obedient:
                    self.alive.discard(action.rank)
                    ended.append(Exited(action.rank, -9))
        return ended


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["star", "group", "none"]))
def test_any_order_of_events_ends_once_with_nobody_left(data: st.DataObject, links: Links) -> None:
    count = data.draw(st.integers(1, 4))
    policy = Elasticity(min_ranks=data.draw(st.integers(1, 3)), max_quick=2, links=links)
    begin = (running_group, starting_group) if links == "group" else (running, starting)
    supervisor = begin[data.draw(st.booleans())](count, policy)
    first = 0 if links == "none" else 1
    processes = Processes(count, are_obedient=data.draw(st.booleans()), first=first)
    now = 2.0

    def take(actions: list[Action]) -> None:
        for exited in processes.obey(actions):
            take(supervisor.handle(exited, now))

    for item in data.draw(st.lists(inputs(count) | news_of_a_group(count), max_size=20)):
        now += data.draw(st.sampled_from([0.0, 0.1, 3.0, 12.0, 70.0]))
        rank = getattr(item, "rank", None)
        if rank is not None and rank not in processes.alive:
            continue  # no process, no news of it
        if isinstance(item, Exited | NotStarted):
            processes.alive.discard(item.rank)
        take(supervisor.handle(item, now))
        take(supervisor.advance(now))
    for _ in range(200):
        if processes.outcomes:
            break
        if supervisor.deadline is None:  # all are at work: only the user ends that
            take(supervisor.handle(Interrupted(), now))
        else:
            now = max(now + 0.1, supervisor.deadline)
            take(supervisor.advance(now))
    (outcome,) = processes.outcomes
    assert processes.alive <= processes.killed, "a rank may still be running"
    codes = {"done": {0}, "failed": {3}, "stopped": {130, 131}}
    assert outcome.exit_code in codes[outcome.status]
    reader_failed = outcome.reason.startswith("the network is gone")
    assert (outcome.failed_rank is not None) == (outcome.status == "failed" and not reader_failed)
    assert "\n" not in outcome.reason
    for row in outcome.departures:
        assert first <= row["rank"] < count and row["reason"]
    assert supervisor.handle(Interrupted(), now) == []
