"""What the driver does between a loss and the next start, with starts that only pretend."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from smolrun.driver import restart
from smolrun.driver.restart import AttemptResult, NextStart, Restarts
from smolrun.errors import HostError
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RunOutcome
from smolrun.tracking.run_folder import RunFolder
from tests.tracking.test_past_runs import a_run
from tests.waiting import SOON_S

HOSTS = "[{name: a, ranks: 2, address: 127.0.0.2}, {name: b}, {name: c, address: 127.0.0.3}]"
LOST = RunOutcome(
    "failed", EXIT_FAILED, "rank 2 on b died", 2, "b", is_lost=True, steps=7, log_tail=["the log"]
)
DONE = RunOutcome("done", EXIT_DONE, steps=9)


class Pretended:
    """A run whose starts end as they are told to; `begun` says which of them train at all."""

    def __init__(
        self,
        folder: RunFolder,
        ends: Sequence[RunOutcome | HostError],
        who_answers: Callable[[], Sequence[str]],
        restart: str = "{max: 2, wait_s: 0.3, min_hosts: 2}",
        begun: bool = True,
    ) -> None:
        overrides = [f"cluster.hosts={HOSTS}", f"cluster.restart={restart}"]
        self.folder = folder
        self.said: list[str] = []
        self.hosts: list[list[str]] = []
        self.starts: list[NextStart] = []
        self._ends = list(ends)
        self._begun = begun
        self.restarts = Restarts(compose(overrides), self.said.append, who_answers)

    def go(self) -> RunOutcome:
        return self.restarts.train(self, self._again)[1]  # type: ignore[arg-type]

    def _again(self, start: NextStart) -> Pretended:
        self.starts.append(start)
        self.hosts.append([host.name for host in start.config.cluster.hosts or []])
        if isinstance(self._ends[0], HostError):
            raise self._ends.pop(0)  # type: ignore[misc]
        return self

    def train(self) -> AttemptResult:
        end = self._ends.pop(0)
        assert isinstance(end, RunOutcome)
        return AttemptResult(end, self.folder, 0, self._begun)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return a_run(tmp_path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "_ASK_EVERY_S", 0.02)
    monkeypatch.setattr(restart, "_POLL_S", 0.01)
    monkeypatch.setattr(restart, "_QUICK_S", 0.1)


def test_it_goes_on_with_those_that_answer_and_says_so_in_one_line(folder: RunFolder) -> None:
    run = Pretended(folder, [LOST, DONE], lambda: ["a", "c"])
    assert run.go() == DONE
    assert run.hosts == [["a", "c"]]
    assert run.said[0] == "rank 2 on b died; waiting 0.3 s for b"
    assert run.said[1] == "  | the log"
    assert run.said[2] == (
        "rank 2 on b died; restart 1 of 2 after step 7, from the beginning: 7 steps lost, on a, c "
        "(without b)"
    )
    assert run.said[3:] == ["the run was restarted 1 time; 7 steps repeated"]
    assert run.restarts.rows == [
        {
            "step": 7,
            "lost_host": "b",
            "lost_rank": 2,
            "reason": "rank 2 on b died",
            "resumed_from": 0,
            "lost_steps": 7,
            "hosts": ["a", "c"],
        }
    ]
    # A later checkpoint.resume uses all hosts.
    assert "name: b" in (folder.path / "config.yaml").read_text()


def test_a_host_that_comes_back_in_time_is_used(folder: RunFolder) -> None:
    answers = iter([["a"], ["a", "c"], ["c", "b", "a"]])
    run = Pretended(folder, [LOST, DONE], lambda: next(answers), "{max: 1, wait_s: 60}")
    assert run.go() == DONE
    assert run.hosts == [["a", "b", "c"]]
    assert run.said[0] == "rank 2 on b died; waiting 60 s for b and c"


def test_a_host_that_comes_back_later_is_used_at_the_next_start(folder: RunFolder) -> None:
    answers = iter([["a", "c"]] * 200)
    run = Pretended(folder, [LOST, LOST, DONE], lambda: next(answers))
    run.restarts._reachable = lambda: ["a", "c"] if not run.starts else ["a", "b", "c"]
    assert run.go() == DONE
    assert run.hosts == [["a", "c"], ["a", "b", "c"]]


def test_too_few_end_the_run_with_what_is_missing(folder: RunFolder) -> None:
    run = Pretended(folder, [LOST], lambda: ["c"])
    ended = run.go()
    assert (ended.status, ended.exit_code, run.restarts.rows) == ("failed", EXIT_FAILED, [])
    assert ended.reason.startswith("rank 2 on b died; a, b did not answer within 0.3 s")
    assert " (cluster.restart.min_hosts=2)" in ended.reason


def test_a_question_that_breaks_or_hangs_means_nobody(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks() -> list[str]:
        raise RuntimeError("no network")

    assert "left: no host" in Pretended(folder, [LOST], breaks).go().reason
    monkeypatch.setattr(restart, "_ANSWER_S", 0.0)
    released = threading.Event()
    run = Pretended(folder, [LOST], lambda: [str(released.wait(30))])
    assert "left: no host" in run.go().reason
    released.set()


def test_max_is_not_more(folder: RunFolder) -> None:
    run = Pretended(folder, [LOST, LOST, LOST], lambda: "abc")
    ended = run.go()
    assert len(run.starts) == 2
    assert ended.reason == (
        "rank 2 on b died; it was restarted 2 times already (cluster.restart.max)"
    )
    assert run.said[-1] == "the run was restarted 2 times; 14 steps repeated"


@pytest.mark.parametrize(
    "end",
    [
        DONE,
        RunOutcome("stopped", EXIT_STOPPED),
        RunOutcome("failed", 3, "rank 0: ValueError", 0, "a"),
    ],
)
def test_what_is_no_loss_is_the_end(folder: RunFolder, end: RunOutcome) -> None:
    run = Pretended(folder, [end], lambda: pytest.fail("nobody is asked"))
    assert run.go() == end
    assert run.said == []


def test_what_never_began_is_the_end(folder: RunFolder) -> None:
    assert Pretended(folder, [LOST], lambda: "abc", begun=False).go() == LOST


def test_without_the_key_a_loss_is_the_end(folder: RunFolder) -> None:
    assert Pretended(folder, [LOST], lambda: "abc", restart="null").go() == LOST


def test_a_host_that_answers_but_cannot_begin_is_left_out(folder: RunFolder) -> None:
    refused = HostError("b", "its disk is full")
    run = Pretended(folder, [LOST, refused, DONE], lambda: "abc")
    assert run.go() == DONE
    assert run.hosts == [["a", "b", "c"], ["a", "c"]]
    assert [row["reason"] for row in run.restarts.rows] == [
        "rank 2 on b died", "b: its disk is full",
    ]  # fmt: skip
    assert [row["step"] for row in run.restarts.rows] == [7, 7]


def test_ctrl_c_while_it_waits_stops_at_once(folder: RunFolder) -> None:
    released = threading.Event()

    def hangs() -> list[str]:
        os.kill(os.getpid(), signal.SIGINT)
        released.wait(30)
        return []

    run = Pretended(folder, [LOST], hangs, "{max: 1, wait_s: 60}")
    began = time.monotonic()
    ended = run.go()
    assert time.monotonic() - began < SOON_S
    released.set()
    assert (ended.status, ended.exit_code) == ("stopped", EXIT_STOPPED)
    assert ended.reason == "stopped by the user after a loss: rank 2 on b died"


def test_task_stop_while_it_waits_stops_at_once(folder: RunFolder) -> None:
    def asked() -> list[str]:
        folder.ask_to_stop()
        return ["a"]

    run = Pretended(folder, [LOST], asked, "{max: 1, wait_s: 60}")
    assert run.go().exit_code == EXIT_STOPPED
    assert run.starts == []
