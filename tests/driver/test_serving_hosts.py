"""Keeping hosts awake, and the unloading of an idle server, with ranks that are the test's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from smolrun.cli.compose import compose
from smolrun.driver import serving
from smolrun.driver.serving import ServingRun
from smolrun.driver.serving_hosts import ServingHosts
from smolrun.errors import HostError, ProtocolError
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.serving.messages import (
    HOSTS,
    Finished,
    HostMemory,
    Ready,
    StayAwake,
    StepOutput,
    Submit,
    ToEngine,
    Token,
)
from smolrun.tracking.run_folder import RunFolder
from tests.tasks.served import model_in
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.timeout(120)


class Driver:
    """What a driver is to its subscribers."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = list(range(ranks))
        self.num_interrupts = 0
        self.sent: list[tuple[int, TaskMessage]] = []

    def send(self, rank: int, message: TaskMessage) -> None:
        self.sent.append((rank, message))

    def requests(self) -> list[ToEngine]:
        return [decode_data(one, ToEngine) for _, one in self.sent if one.topic == "serving"]  # type: ignore[arg-type]


def test_all_machines_stay_awake_from_a_request_to_a_minute_after_it() -> None:
    now, frontend, driver = [100.0], SimpleNamespace(num_requests=0), Driver(2)
    hosts = ServingHosts(frontend, clock=lambda: now[0])  # type: ignore[arg-type]

    def told() -> list[tuple[int, bool]]:
        hosts.on_poll()
        said = [(rank, decode_data(one, StayAwake).is_on) for rank, one in driver.sent]
        driver.sent.clear()
        return said

    hosts.on_start(driver)  # type: ignore[arg-type]
    assert told() == [(0, True), (1, True)]  # the model is being loaded
    now[0] = 159.0
    assert told() == []
    now[0] = 160.0
    assert told() == [(0, False), (1, False)]
    frontend.num_requests = 1
    assert told() == [(0, True), (1, True)]
    now[0] = 1000.0
    assert told() == []
    frontend.num_requests = 0
    now[0] = 1059.0
    assert told() == []
    now[0] = 1060.0
    assert told() == [(0, False), (1, False)]
    hosts.close()


def test_hosts_beside_that_of_the_driver_stay_awake_as_long_as_they_hold_the_model() -> None:
    now, driver = [100.0], Driver(2)
    idle: Any = SimpleNamespace(num_requests=0)
    hosts = ServingHosts(idle, is_spread=True, clock=lambda: now[0])
    hosts.on_start(driver)  # type: ignore[arg-type]
    for now[0] in (100.0, 1000.0, 100_000.0):
        hosts.on_poll()
    assert [rank for rank, _ in driver.sent] == [0, 1]
    hosts.on_restart(1)
    assert [rank for rank, _ in driver.sent] == [0, 1, 1]
    assert all(decode_data(message, StayAwake).is_on for _, message in driver.sent)
    assert hosts._switch.is_on
    hosts.on_end()  # unloaded: the ranks are gone, and with them what kept their machines awake
    assert not hosts._switch.is_on
    hosts.close()


def test_a_rank_reports_the_memory_of_its_own_host_only() -> None:
    reports: list[HostMemory] = []
    hosts = ServingHosts(SimpleNamespace(note_memory=reports.append))  # type: ignore[arg-type]
    report = HostMemory(1, "mini1", 1, 2, 3)
    hosts.on_message(1, task_message(HOSTS, report))
    assert reports == [report]
    with pytest.raises(ProtocolError, match="memory of rank 1"):
        hosts.on_message(0, task_message(HOSTS, report))
    hosts.close()


class Ranks:
    """In place of run_on_ranks: each start does what the test says, on the driver's thread."""

    def __init__(self, *starts: Callable[[Ranks], RunOutcome]) -> None:
        self.starts = list(starts)
        self.num_starts = 0

    def __call__(
        self, config: object, folder: object, fleet: object, subscribers: Any, **keys: Any
    ) -> RunOutcome:
        self.num_starts += 1
        self.driver, self.subscribers = Driver(), subscribers
        self.stop_requests = keys["stop_requests"]
        for one in subscribers:
            one.on_start(self.driver)
        try:
            return self.starts.pop(0)(self)
        finally:
            for one in subscribers:
                one.on_end()

    def say(self, message: Any) -> None:
        (bridge,) = [one for one in self.subscribers if one.topic == "serving"]
        bridge.on_message(0, task_message("serving", message))

    def serve(self) -> RunOutcome:
        """Answer each request by one token, until a stop is asked for and allowed."""
        self.say(Ready(64, 512, 8))
        return self.load()

    def load(self) -> RunOutcome:
        """As `serve`, without a model, so nothing is answered."""
        answered: set[str] = set()
        give_up = time.monotonic() + SOON_S
        while time.monotonic() < give_up:
            for one in self.subscribers:
                one.on_poll()
            for request in self.driver.requests():
                if isinstance(request, Submit) and request.request not in answered:
                    answered.add(name := request.request)
                    self.say(StepOutput([Token(name, 0, 65)], [Finished(name, 0, "length")]))
            if self.stop_requests() and all(one.may_stop() for one in self.subscribers):
                return RunOutcome("stopped", 130, "stopped by the user before training began")
            time.sleep(0.01)
        raise AssertionError("nobody stopped the ranks")


@pytest.fixture
def started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Ranks], tuple[str, RunFolder, list[RunOutcome], list[str]]]]:
    """Serves on given ranks, on a thread: its URL, its folder, its outcome, and what it says."""
    model = model_in(tmp_path / "tiny")
    asked = ["task=serve", "model=hf", f"model.name={model}", "serving.port=0"]
    config = compose([*asked, "serving.unload_after_min=0.01"])
    threads: list[threading.Thread] = []
    folders: list[RunFolder] = []

    def begin(ranks: Ranks) -> tuple[str, RunFolder, list[RunOutcome], list[str]]:
        monkeypatch.setattr(serving, "run_on_ranks", ranks)
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        folders.append(folder)
        outcomes: list[RunOutcome] = []
        said: list[str] = []
        ready = threading.Event()
        run = ServingRun(config, said.append, lambda *_: None)

        def serve() -> None:
            with run:
                outcomes.append(run.serve(folder, on_ready=lambda _: ready.set()))

        threads.append(threading.Thread(target=serve))
        threads[0].start()
        assert ready.wait(SOON_S)
        return run.url, folder, outcomes, said

    yield begin
    for folder in folders:
        folder.ask_to_stop()
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()


def status(url: str) -> str:
    answer = httpx.get(f"{url}/readyz")
    return f"{answer.status_code} {answer.json()['status']}"


def ask(url: str) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=SOON_S)


def test_an_idle_server_stops_its_ranks_and_a_request_brings_new_ones(started: Any) -> None:
    ranks = Ranks(Ranks.serve, Ranks.serve)
    url, folder, outcomes, said = started(ranks)
    before = ask(url).json()
    until(lambda: status(url) == "200 unloaded")
    until(lambda: any(line.startswith("the model is unloaded: no request") for line in said))
    assert ranks.num_starts == 1
    after = ask(url).json()
    assert after["choices"] == before["choices"] and ranks.num_starts == 2
    until(lambda: any(line.startswith("the model is loaded again after") for line in said))
    until(lambda: status(url) == "200 unloaded")
    folder.ask_to_stop()  # nothing runs that could be stopped
    until(lambda: bool(outcomes))
    assert (outcomes[0].status, outcomes[0].exit_code) == ("stopped", 130)
    assert outcomes[0].reason == "stopped by the user"


def test_a_model_that_no_longer_fits_is_said_and_tried_again_by_the_next(started: Any) -> None:
    def full(ranks: Ranks) -> RunOutcome:
        return RunOutcome("failed", 3, "tiny does not fit: it needs 9 GB")

    def away(ranks: Ranks) -> RunOutcome:
        raise HostError("mini2", "does not answer")

    url, _, outcomes, said = started(ranks := Ranks(Ranks.serve, full, away, Ranks.serve))
    until(lambda: status(url) == "200 unloaded")
    for what in ("tiny does not fit: it needs 9 GB", "mini2: does not answer"):
        refused = ask(url)
        assert refused.status_code == 503 and what in refused.json()["error"]["message"]
        until(lambda: status(url) == "200 unloaded")
        assert any(what in line and "the next request tries" in line for line in said)
    assert ask(url).status_code == 200
    assert ranks.num_starts == 4 and not outcomes


def test_a_stop_does_not_wait_for_answers_of_a_model_that_is_still_loaded(started: Any) -> None:
    url, folder, outcomes, said = started(Ranks(Ranks.serve, Ranks.load))
    until(lambda: status(url) == "200 unloaded")
    refused: list[int] = []
    client = threading.Thread(target=lambda: refused.append(ask(url).status_code))
    client.start()
    until(lambda: status(url) == "200 loading")
    folder.ask_to_stop()
    until(lambda: bool(outcomes))
    client.join(SOON_S)
    assert refused == [503] and outcomes[0].status == "stopped"
    assert not [line for line in said if line.startswith("running answers get up to")]


def test_a_rank_that_is_lost_after_the_model_was_loaded_again_ends_the_server(started: Any) -> None:
    def lost(ranks: Ranks) -> RunOutcome:
        ranks.say(Ready(64, 512, 8))
        return RunOutcome("failed", 3, "rank 0 was killed", 0, "local")

    url, _, outcomes, _ = started(Ranks(Ranks.serve, lost))
    until(lambda: status(url) == "200 unloaded")
    assert ask(url).status_code == 503
    until(lambda: bool(outcomes))
    assert (outcomes[0].status, outcomes[0].failed_rank) == ("failed", 0)
