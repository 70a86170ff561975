"""tracker.loki against a strict fake of Loki's API: every line once, in order, whatever happens."""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from smolrun.errors import SmolrunError
from smolrun.log_records import LogRecord, at, encode
from smolrun.tracking import loki as module
from smolrun.tracking.loki import Batch, LokiShipper, authorization, is_private
from smolrun.tracking.run_folder import RunFolder
from tests.tracking.fake_loki import FakeLoki, serving
from tests.waiting import until


class Run:
    """A run that logs, and the shipper of its logs."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = RunFolder(tmp_path / "20260131-120000-run-3fa9")
        self.folder.logs.mkdir(parents=True)
        self.warnings: list[str] = []

    def log(self, rank: int | None, message: str, level: str | None = "info") -> None:
        name = "driver" if rank is None else f"rank{rank}-pi"
        line = encode(LogRecord(at(time.time()), rank, "pi", level, "a", message))  # type: ignore[arg-type]
        with (self.folder.logs / f"{name}.jsonl").open("ab") as file:
            file.write(line)

    def ship(self, url: str, end_s: float = 20.0) -> LokiShipper:
        return LokiShipper(self.folder, url, self.warnings.append, end_s=end_s)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(module, "credentials_file", lambda: tmp_path / "loki.key")
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_BATCH_S", 0.0)
    monkeypatch.setattr("smolrun.tracking.logs.FOLLOW_EVERY_S", 0.02)
    return Run(tmp_path)


@pytest.fixture
def loki() -> Iterator[tuple[FakeLoki, str]]:
    fake = FakeLoki()
    with serving(fake) as url:
        yield fake, url


def texts(fake: FakeLoki) -> list[str]:
    return [line for _, _, line in fake.lines]


def test_every_line_arrives_once_with_its_labels(run: Run, loki: tuple[FakeLoki, str]) -> None:
    fake, url = loki
    run.log(0, "of an earlier part of a resumed run")
    shipper = run.ship(url)
    for number in range(3):
        for rank in (None, 0, 1):
            run.log(rank, f"{number}", "warning" if number == 1 else "info")
        until(lambda seen=3 * (number + 1): len(fake.lines) == seen)
    run.log(1, "printed", None)
    shipper.close()
    assert (fake.refused, run.warnings) == ([], [])
    assert (shipper.num_sent, shipper.num_dropped) == (10, 0)
    labels = {tuple(sorted(labels.items())) for labels, _, _ in fake.lines}
    runs = ("run", run.folder.run_id)
    assert labels == {
        (("host", "pi"), ("level", level), ("rank", rank), runs)
        for rank, levels in (
            ("driver", ["info", "warning"]),
            ("0", ["info", "warning"]),
            ("1", ["info", "warning", "unknown"]),
        )
        for level in levels
    }
    assert texts(fake)[-1] == "a: printed" and "earlier" not in str(texts(fake))
    assert all(abs(ns / 1e9 - time.time()) < 600 for _, ns, _ in fake.lines)
    _, headers = fake.requests[0]
    assert headers["content-encoding"] == "gzip" and "authorization" not in headers


def test_lines_of_one_time_keep_their_order() -> None:
    batch, fake = Batch("run"), FakeLoki()
    when = datetime(2026, 1, 31, tzinfo=UTC)
    for part in range(2):
        for number in range(50):
            batch.add(LogRecord(when, 0, "pi", None, None, f"{part} {number}"))
        fake.accept(batch.take())
    assert texts(fake) == [f"{part} {number}" for part in range(2) for number in range(50)]
    stamps = [ns for _, ns, _ in fake.lines]
    assert stamps == sorted(set(stamps)) and batch.num_lines == 0


def test_hostile_names_and_the_longest_line_are_accepted() -> None:
    batch, fake = Batch("r" * 5000), FakeLoki()
    batch.add(
        LogRecord(
            datetime(2026, 1, 31, tzinfo=UTC), 0, "\x1b\n" * 3000, None, "a", "\N{SNOWMAN}" * 65_536
        )
    )
    fake.accept(batch.take())
    assert len(fake.lines) == 1


@pytest.mark.parametrize("fault", [429, 500, 503])
def test_what_the_server_cannot_take_now_is_sent_again(
    run: Run, loki: tuple[FakeLoki, str], fault: int
) -> None:
    fake, url = loki
    fake.faults = [fault] * 5
    shipper = run.ship(url)
    run.log(0, "one")
    until(lambda: texts(fake) == ["a: one"])
    run.log(0, "two")
    shipper.close()
    assert texts(fake) == ["a: one", "a: two"]
    assert (shipper.num_sent, shipper.num_dropped) == (2, 0)
    (warning,) = run.warnings
    assert warning == (
        f"tracker.loki: {url}/loki/api/v1/push answers {fault}: answers {fault} with a second "
        "line; its lines wait in logs/"
    )


def test_what_the_server_refuses_is_counted_and_said_once(
    run: Run, loki: tuple[FakeLoki, str]
) -> None:
    fake, url = loki
    fake.faults = [400, 400]
    shipper = run.ship(url)
    for number in range(3):
        run.log(0, f"{number}")
        until(lambda seen=number + 1: len(fake.requests) == seen)
    shipper.close()
    assert texts(fake) == ["a: 2"]
    first, last = run.warnings
    assert "answers 400: answers 400 with a second line; its lines are not sent" in first
    assert "did not get 2 of 3 lines" in last


def test_a_wrong_url_costs_two_sentences(run: Run, loki: tuple[FakeLoki, str]) -> None:
    _, url = loki
    shipper = run.ship(f"{url}/wrong")
    run.log(0, "one")
    until(lambda: run.warnings)
    shipper.close()
    first, last = run.warnings
    assert f"{url}/wrong/loki/api/v1/push answers 404: 404 page not found" in first
    assert "did not get 1 of 1 lines" in last


@pytest.mark.parametrize("suffix", ["", "/", "/loki/api/v1/push"])
def test_the_url_is_the_servers_or_that_of_its_api(
    run: Run, loki: tuple[FakeLoki, str], suffix: str
) -> None:
    fake, url = loki
    shipper = run.ship(url + suffix)
    run.log(0, "one")
    shipper.close()
    assert texts(fake) == ["a: one"]


def test_a_server_that_comes_later_gets_everything(run: Run) -> None:
    fake = FakeLoki()
    with serving(fake) as url:
        pass  # its port is free again
    shipper = run.ship(url)
    run.log(0, "while it is down")
    until(lambda: run.warnings)
    assert "does not answer" in run.warnings[0]
    with serving(fake, int(url.rpartition(":")[2])):
        until(lambda: fake.lines)
        run.log(0, "at the end")
        shipper.close()
    assert texts(fake) == ["a: while it is down", "a: at the end"]
    assert len(run.warnings) == 1


def test_a_server_that_never_answers_ends_no_run(run: Run, loki: tuple[FakeLoki, str]) -> None:
    fake, url = loki
    fake.faults = ["slow"] * 100
    shipper = run.ship(url, end_s=0.5)
    run.log(0, "one")
    until(lambda: fake.requests)
    began = time.monotonic()
    for number in range(1000):  # whoever logs waits for nothing
        run.log(0, f"{number}")
    shipper.close()
    assert time.monotonic() - began < 30
    assert re.search(r"Loki did not get \d+ of \d+ lines; logs/ of the run", run.warnings[-1])
    fake.going_on.set()


def test_many_lines_are_few_requests_of_bounded_size(run: Run, loki: tuple[FakeLoki, str]) -> None:
    fake, url = loki
    line = encode(LogRecord(at(time.time() + 60), 0, "pi", "info", None, "x" * 2000))
    (run.folder.logs / "rank0-pi.jsonl").write_bytes(line * 1000)
    shipper = run.ship(url)
    shipper.close()
    assert len(fake.lines) == 1000 and fake.refused == []
    assert 4 <= len(fake.requests) <= 8, "2 MB by half a MiB"


def test_credentials_come_from_a_file_and_travel_in_private_only(
    run: Run, tmp_path: Path, loki: tuple[FakeLoki, str]
) -> None:
    fake, url = loki
    file = module.credentials_file()
    for content, header in [
        ("me:pass:word", "Basic " + base64.b64encode(b"me:pass:word").decode()),
        ("token-5\n", "Bearer token-5"),
    ]:
        file.write_text(content)
        shipper = run.ship(url)
        run.log(0, "one")
        shipper.close()
        assert fake.requests[-1][1]["authorization"] == header
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(SmolrunError, match="https"):
        authorization("http://192.168.1.5:3100/loki/api/v1/push")
    file.write_text("")
    shipper = run.ship(url)
    run.log(0, "without")
    shipper.close()
    assert texts(fake)[-1] == "a: without" and "authorization" not in fake.requests[-1][1]
    assert "is empty" in run.warnings[0] and "no credentials" in run.warnings[0]


@pytest.mark.parametrize(
    ("url", "is_so"),
    [
        ("https://logs.example", True),
        ("http://localhost:3100", True),
        ("http://127.0.0.5:3100", True),
        ("http://[::1]:3100", True),
        ("http://192.168.1.5:3100", False),
        ("http://localhost.example", False),
    ],
)
def test_what_is_private(url: str, is_so: bool) -> None:
    assert is_private(url) is is_so


def test_its_thread_ends(run: Run, loki: tuple[FakeLoki, str]) -> None:
    run.ship(loki[1]).close()
    assert "smolrun-loki" not in {thread.name for thread in threading.enumerate()}
