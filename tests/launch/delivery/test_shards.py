"""Checkpoints of ranks elsewhere come to the driver, whole or not at all, and hold nobody up."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.checkpoints.committer import CheckpointCommitter
from smolrun.checkpoints.find import verify
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard
from smolrun.errors import HostError
from smolrun.events import CheckpointSaved, Event, Note, ShardFailed, ShardSaved, StepSkipped
from smolrun.launch.delivery import shards
from smolrun.launch.delivery.shards import ShardFetcher, ShardOrigin
from tests.launch.here import HereMachine
from tests.waiting import SOON_S, until

TOKEN = "t1"


class Hosts:
    """Two machines of a run, a rank on each, and the driver's folder."""

    def __init__(self, tmp_path: Path) -> None:
        self.machines = [HereMachine(tmp_path / f"mini{k}", f"mini{k}") for k in (1, 2)]
        self.here = tmp_path / "outputs" / "run" / "checkpoints"
        self.there = [f"{machine.workdir}/runs/run/checkpoints" for machine in self.machines]
        self.told: list[tuple[str, int, int]] = []
        self.fetchers: list[ShardFetcher] = []

    def fetcher(self, open_again: Any = None) -> ShardFetcher:
        origins: Any = {
            rank: ShardOrigin(machine, there)  # type: ignore[arg-type]
            for rank, (machine, there) in enumerate(zip(self.machines, self.there, strict=True))
        }
        made = ShardFetcher(
            origins,
            self.here,
            TOKEN,
            progress=lambda *done: self.told.append(done),
            open_again=open_again,
        )
        self.fetchers.append(made)
        return made

    def part(self, rank: int, updates: int) -> Path:
        return Path(self.there[rank]) / f"step-{updates:08d}.part-{TOKEN}"

    def save(self, rank: int, updates: int = 10, data: bytes = b"weights") -> ShardSaved:
        """What a rank's saver does there, and says."""
        name = f"rank{rank}-0.safetensors"
        part = self.part(rank, updates)
        part.mkdir(parents=True, exist_ok=True)
        (part / name).write_bytes(data)
        files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        report = {"rank": rank, "files": files, "tensors": {}}
        return ShardSaved(updates, rank, report, {}, 0.0, 0.1)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    for fetcher in made.fetchers:
        fetcher.finish(0)
    until(lambda: not [t for t in threading.enumerate() if t.name.endswith("-fetch")])


def wait_arrived(fetcher: ShardFetcher, count: int = 1) -> list[Event]:
    found: list[Event] = []

    def is_all_there() -> bool:
        found.extend(fetcher.arrived())
        return len(found) >= count

    until(is_all_there, 20)
    return found


def test_a_ranks_word_comes_when_its_files_are_here(hosts: Hosts) -> None:
    fetcher, saved = hosts.fetcher(), hosts.save(1)
    assert fetcher.take(saved)
    assert wait_arrived(fetcher) == [saved]
    assert (hosts.here / hosts.part(1, 10).name / "rank1-0.safetensors").read_bytes() == b"weights"
    until(lambda: not hosts.part(1, 10).exists())  # the host needs the room
    assert fetcher.arrived() == []
    assert hosts.told == [], "while training goes on nobody is told of it"


def test_what_is_no_word_of_a_rank_elsewhere_passes(hosts: Hosts) -> None:
    fetcher = hosts.fetcher()
    of_this_machine = ShardSaved(10, 7, {"files": {}}, {}, 0.0, 0.0)
    for event in (StepSkipped(1, [0]), ShardFailed(10, 7, "disk full"), of_this_machine):
        assert not fetcher.take(event)


def test_a_save_that_failed_elsewhere_is_told_with_its_host(hosts: Hosts) -> None:
    fetcher = hosts.fetcher()
    assert fetcher.take(ShardFailed(10, 1, "disk full"))
    assert fetcher.arrived() == [ShardFailed(10, 1, "mini2: disk full")]


def test_a_file_that_is_larger_than_was_reported_is_not_fetched(hosts: Hosts) -> None:
    saved = hosts.save(1, data=b"x" * 10)
    with (hosts.part(1, 10) / "rank1-0.safetensors").open("r+b") as file:
        file.truncate(1 << 30)
    fetcher = hosts.fetcher()
    assert fetcher.take(saved)
    (failed,) = wait_arrived(fetcher)
    assert isinstance(failed, ShardFailed) and (failed.updates, failed.rank) == (10, 1)
    assert failed.reason.startswith("mini2: ")
    assert list((hosts.here / hosts.part(1, 10).name).iterdir()) == []


def keeper_of(hosts: Hosts, events: list[Event]) -> CheckpointCommitter:
    """The real one, on the driver."""
    return CheckpointCommitter(
        hosts.here,
        TOKEN,
        world_size=2,
        run_id="run",
        config_hash="c",
        keep=2,
        keep_best=False,
        emit=events.append,
    )


def test_a_checkpoint_of_two_hosts_is_whole_on_the_driver(hosts: Hosts) -> None:
    """With the real writer and committer."""
    events: list[Event] = []
    committer = keeper_of(hosts, events)
    fetcher = hosts.fetcher()
    whole = torch.arange(10.0)
    for rank, half in enumerate((whole[:4], whole[4:])):
        piece = TensorSlice("weight", (10,), 4 * rank, half)
        report = write_shard(hosts.part(rank, 10), rank, [piece])
        assert fetcher.take(ShardSaved(10, rank, report, {}, 0.0, 0.1))
    for event in wait_arrived(fetcher, 2):
        committer.record(event)
    (saved,) = events
    assert isinstance(saved, CheckpointSaved)
    assert verify(hosts.here / saved.folder).num_bytes == saved.bytes


@pytest.mark.parametrize("damage", ["bytes", "cut", "gone", "lost"])
def test_what_does_not_arrive_whole_is_a_failed_save_that_names_the_host(
    hosts: Hosts, damage: str
) -> None:
    fetcher, saved = hosts.fetcher(), hosts.save(1)
    file = hosts.part(1, 10) / "rank1-0.safetensors"
    if damage == "bytes":
        file.write_bytes(b"Weights")
    elif damage == "cut":
        file.write_bytes(b"weight")
    elif damage == "gone":
        file.unlink()
    else:
        hosts.machines[1].before_get = lambda path: lose("mini2", "connection lost")
    fetcher.take(saved)
    (failed,) = wait_arrived(fetcher)
    assert isinstance(failed, ShardFailed)
    assert (failed.updates, failed.rank) == (10, 1)
    assert "mini2: " in failed.reason
    next_one = hosts.save(0, updates=20)  # and the other host goes on
    fetcher.take(next_one)
    assert wait_arrived(fetcher) == [next_one]


def test_what_was_saved_is_fetched_by_another_connection_where_one_was_lost(hosts: Hosts) -> None:
    lost, again = hosts.machines[1], HereMachine(Path(hosts.machines[1].home), "mini2")
    lost.connection.lost = "reset by peer"
    lost.before_get = lambda path: lose("mini2", "connection lost")
    reopened: list[HereMachine] = []
    closed = threading.Event()
    again.close = closed.set  # type: ignore[method-assign]

    def open_again(machine: HereMachine) -> HereMachine:
        reopened.append(machine)
        if len(reopened) == 1:
            raise HostError("mini2", "still away")
        return again

    fetcher = hosts.fetcher(open_again)
    saves = [hosts.save(1, updates) for updates in (10, 20, 30)]
    for saved in saves:
        fetcher.take(saved)
    failed, *arrived = fetcher.finish(SOON_S)
    assert isinstance(failed, ShardFailed)
    assert "still away" in failed.reason
    assert arrived == saves[1:]
    assert reopened == [lost, lost], "one connection for all that follow"
    until(lambda: not hosts.part(1, 30).exists() and closed.is_set())


def lose(host: str, why: str) -> None:
    raise HostError(host, why)


@pytest.mark.parametrize(
    "files",
    [
        {"../../evil": {"bytes": 1, "sha256": "0"}},
        {"rank0-0.safetensors": {"bytes": 1, "sha256": "0"}},
        {"rank1-0.safetensors": {"bytes": "many", "sha256": "0"}},
        ["rank1-0.safetensors"],
        None,
    ],
)
def test_a_report_that_leads_elsewhere_is_refused(hosts: Hosts, files: Any) -> None:
    fetcher = hosts.fetcher()
    assert fetcher.take(ShardSaved(10, 1, {"files": files}, {}, 0.0, 0.0))
    (failed,) = fetcher.arrived()
    assert isinstance(failed, ShardFailed)
    assert failed.reason.startswith("mini2: ")
    assert not hosts.here.exists()


def test_a_host_that_hangs_holds_up_nobody(hosts: Hosts) -> None:
    release = threading.Event()
    hosts.machines[0].before_get = lambda path: release.wait(30)
    fetcher = hosts.fetcher()
    began = time.monotonic()
    saves = list(range(10, 10 + shards._MOST_SAVES + 2))
    for updates in saves:
        assert fetcher.take(hosts.save(0, updates))
    assert time.monotonic() - began < SOON_S
    skipped = wait_arrived(fetcher, 2)
    for event in skipped:
        assert isinstance(event, ShardFailed)
        assert "mini1: skipped" in event.reason and "raise checkpoint.every" in event.reason
    for updates in saves:  # a save that one host skips is of no use from the others
        fetcher.take(hosts.save(1, updates))
    of_other = wait_arrived(fetcher, len(saves))
    of_both = {event.updates for event in of_other if isinstance(event, ShardFailed)}
    assert of_both == {event.updates for event in skipped} == set(saves[-3:-1])  # type: ignore[attr-defined]
    release.set()
    arrived = wait_arrived(fetcher, shards._MOST_SAVES)
    assert [event.updates for event in arrived] == [*saves[:-3], saves[-1]]  # type: ignore[attr-defined]
    for there in hosts.there:  # also of what was skipped
        until(lambda there=there: os.listdir(there) == [])  # type: ignore[misc]


def test_a_link_that_is_too_slow_costs_checkpoints_but_neither_the_last_nor_the_run(
    hosts: Hosts,
) -> None:
    release, events = threading.Event(), list[Event]()
    for machine in hosts.machines:
        machine.before_get = lambda path: release.wait(30)
    committer, fetcher = keeper_of(hosts, events), hosts.fetcher()
    for updates in range(1, 31):
        for rank in (0, 1):
            fetcher.take(hosts.save(rank, updates))
        for event in fetcher.arrived():
            committer.record(event)
    release.set()
    for event in fetcher.finish(SOON_S):
        committer.record(event)
    assert committer.failure is None
    saved = [event.step + 1 for event in events if isinstance(event, CheckpointSaved)]
    assert saved == [1, 2, 3, 4, 5, 30]
    notes = [event.message for event in events if isinstance(event, Note)]
    assert len(notes) == 24 and all("mini" in note and "skipped" in note for note in notes)


def test_the_end_waits_for_what_is_under_way_and_tells(hosts: Hosts) -> None:
    fetcher = hosts.fetcher()
    finishing = threading.Event()
    hosts.machines[0].before_get = lambda path: finishing.wait(30)
    saved = hosts.save(0)
    fetcher.take(saved)
    threading.Timer(0.3, finishing.set).start()
    assert fetcher.finish(30) == [saved]
    assert hosts.told == [("fetching checkpoints", 7, 7)]
    late = hosts.save(0, updates=20)
    assert fetcher.take(late)
    (failed,) = fetcher.finish(30)
    assert isinstance(failed, ShardFailed)
    assert "the run is over" in failed.reason


def test_the_end_waits_no_longer_than_it_may(hosts: Hosts) -> None:
    release = threading.Event()
    hosts.machines[0].before_get = lambda path: release.wait(30)
    fetcher = hosts.fetcher()
    fetcher.take(hosts.save(0))
    fetcher.take(hosts.save(0, updates=20))
    began = time.monotonic()
    events = fetcher.finish(0.3)
    assert time.monotonic() - began < SOON_S
    assert [getattr(event, "reason", None) for event in events] == [
        "mini1: not fetched in time"
    ] * 2
    release.set()
    until(lambda: not [t for t in threading.enumerate() if t.name == "smolrun-mini1-fetch"])
    assert fetcher.arrived() == [], "nothing is told twice"


def test_a_full_disk_of_the_driver_is_told(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 3

    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: Usage())
    fetcher = hosts.fetcher()
    fetcher.take(hosts.save(0))
    (failed,) = wait_arrived(fetcher)
    assert "do not fit on the driver's disk" in getattr(failed, "reason", "")


def test_a_failed_fetch_leaves_the_last_checkpoint_and_the_run(hosts: Hosts) -> None:
    events: list[Event] = []
    committer = keeper_of(hosts, events)
    hosts.machines[1].before_get = lambda path: lose("mini2", "connection lost")
    fetcher = hosts.fetcher()
    for rank in (0, 1):
        fetcher.take(hosts.save(rank))
    for event in wait_arrived(fetcher, 2):
        committer.record(event)
    (note,) = events
    assert isinstance(note, Note)
    assert "rank 1: mini2: connection lost; training continues" in note.message
    assert os.listdir(hosts.here) == []
