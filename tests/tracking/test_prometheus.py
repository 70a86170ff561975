"""tracker.prometheus: what a scrape gets, and who gets it."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from smolrun.events import (
    EvalDone,
    GradientDropped,
    Note,
    RankStep,
    RunStarted,
    StepDone,
    StepSkipped,
)
from smolrun.tracking import prometheus
from smolrun.tracking.prometheus import PrometheusServer

RUN = '20260131-120000-a"b\\c-3fa9'
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def step(number: int, loss: float | None = 2.5) -> StepDone:
    return StepDone(number, 1.0, loss, 0.5, 1e-3, 100, 50.0, 0, 0, 0.1, 0.0)


def rank_step(rank: int, number: int, **more: object) -> RankStep:
    return RankStep(number, rank, 0.25, 0.5, None, 1000, 2000, **more)  # type: ignore[arg-type]


EVENTS = [
    RunStarted(147_552, 30, 1000, 10, "cpu"),
    *(step(number) for number in range(3)),
    *(rank_step(rank, number, samples=4) for number in range(2) for rank in range(2)),
    rank_step(
        1, 2,
        cpu_percent=90.0, memory_bytes=10, device_memory_bytes=11, device_util=12.0,
        temperature_c=61.5, throttled=True,
    ),
    EvalDone(2, 2.25, 100, 0.5),
    StepSkipped(2, [1]),
    GradientDropped(2, 1, 1),
    Note("info", "nothing to count"),
    rank_step(7, 1),  # there is no such rank
]  # fmt: skip


@pytest.fixture
def server() -> Iterator[PrometheusServer]:
    server = PrometheusServer(RUN, ["mini1", "mini2"], 0, "127.0.0.1")
    yield server
    server.close()


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    address, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request("GET", f"/{path}", headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def scraped(url: str) -> Samples:
    status, text = get(url)
    assert status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_has_the_newest_figures_and_all_that_is_counted(server: PrometheusServer) -> None:
    of_run = (("run", RUN),)
    assert set(scraped(server.url)) == {
        ("smolrun_train_tokens_total", of_run),
        ("smolrun_train_skipped_steps_total", of_run),
    }
    for event in EVENTS:
        server.record(event)
    found = scraped(server.url)
    assert {name: value for (name, labels), value in found.items() if labels == of_run} == {
        "smolrun_train_planned_steps": 30,
        "smolrun_train_parameters": 147_552,
        "smolrun_train_steps": 3,
        "smolrun_train_loss": 2.5,
        "smolrun_train_gradient_norm": 0.5,
        "smolrun_train_learning_rate": 1e-3,
        "smolrun_train_tokens_per_second": 50,
        "smolrun_train_tokens_total": 300,
        "smolrun_train_skipped_steps_total": 1,
        "smolrun_eval_loss": 2.25,
        "smolrun_eval_accuracy": 0.5,
    }
    of_rank_1 = (("host", "mini2"), ("rank", "1"), *of_run)
    assert {name: value for (name, labels), value in found.items() if labels == of_rank_1} == {
        "smolrun_rank_steps": 3,
        "smolrun_rank_compute_seconds_total": 0.75,
        "smolrun_rank_wait_seconds_total": 1.5,
        "smolrun_rank_sent_bytes_total": 3000,
        "smolrun_rank_received_bytes_total": 6000,
        "smolrun_rank_samples_total": 8,
        "smolrun_rank_cpu_percent": 90,
        "smolrun_rank_memory_bytes": 10,
        "smolrun_rank_device_memory_bytes": 11,
        "smolrun_rank_device_percent": 12,
        "smolrun_rank_temperature_celsius": 61.5,
        "smolrun_rank_throttled": 1,
        "smolrun_rank_dropped_gradients_total": 1,
    }
    of_rank_0 = {name for name, labels in found if ("rank", "0") in labels}
    assert "smolrun_rank_steps" in of_rank_0 and "smolrun_rank_memory_bytes" not in of_rank_0
    assert {dict(labels).get("rank") for _, labels in found} == {None, "0", "1"}


def test_a_loss_that_is_no_number_has_no_value(server: PrometheusServer) -> None:
    server.record(step(0))
    server.record(step(1, None))
    names = {name for name, _ in scraped(server.url)}
    assert "smolrun_train_loss" not in names and "smolrun_train_steps" in names


def test_pages_of_other_names_get_nothing(server: PrometheusServer) -> None:
    port = server.url.split(":")[2].split("/")[0]
    for host, status in [
        (f"127.0.0.1:{port}", 200),
        ("localhost", 200),
        (f"evil.example:{port}", 403),
        ("", 403),
    ]:
        assert get(server.url, {"Host": host})[0] == status, host


def test_beyond_this_machine_a_key_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "api_key", lambda: ("right", False))
    server = PrometheusServer(RUN, ["mini1"], 0, "0.0.0.0")
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for given, status in [
            (None, 401),
            ("Bearer wrong", 401),
            ("Basic right", 401),
            ("Bearer right", 200),
        ]:
            headers = {"Host": "mini1.local:9000", **({"Authorization": given} if given else {})}
            assert get(url, headers)[0] == status, given
    finally:
        server.close()


def test_a_port_that_is_taken_is_an_os_error_and_free_again_after_the_end() -> None:
    server = PrometheusServer(RUN, [], 0, "127.0.0.1")
    port = int(server.url.split(":")[2].split("/")[0])
    with pytest.raises(OSError, match="in use"):
        PrometheusServer(RUN, [], port, "127.0.0.1")
    server.close()
    PrometheusServer(RUN, [], port, "127.0.0.1").close()
