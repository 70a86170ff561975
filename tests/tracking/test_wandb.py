"""The W&B run: complete online, never doubled, and whatever the server does, nobody waits long.

Against the real wandb package and a small server (fake_wandb.py) over real HTTP.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.driver.resume import ResumePoint, restore_folder
from smolrun.events import EvalDone, Event, Norms, RankStep, StepDone, TextSample
from smolrun.tracking.jsonl import JsonLines
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.trackers import Fanout
from smolrun.tracking.wandb import (
    Status,
    WandbRun,
    last_step_in,
    last_step_written,
    read_status,
    write_status,
)
from tests.tracking.fake_wandb import KEY, FakeWandb, Fault, fake_wandb
from tests.waiting import SOON_S, until

STEPS = 12


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody is logged in, and W&B's own settings are not this machine's."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.create(tmp_path, "gpt", now=datetime.datetime.now())
    made.write_config(f"training: {{steps: {STEPS}}}\nmodel: {{name: mlp, api_key: not-for-you}}\n")
    return made


@dataclass
class Told:
    """What a user would see of a run, and how long its end took."""

    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    close_s: float = 0.0


def train(folder: RunFolder, steps: range, *, timeout_s: float = 10.0, **keys: Any) -> Told:
    """What a run does with its trackers."""
    told = Told()
    metrics = JsonLines(folder.metrics)
    run = start(folder, told, timeout_s=timeout_s, **keys)
    fanout = Fanout([metrics, run], warn=told.warnings.append)
    for event in events(steps):
        fanout.record(event)
    began = time.monotonic()
    fanout.close()
    told.close_s = time.monotonic() - began
    return told


def start(folder: RunFolder, told: Told, *, timeout_s: float = 10.0, **keys: Any) -> WandbRun:
    usual = {"mode": "auto", "project": "smolrun", "entity": None, "group": None, "tags": []}
    return WandbRun(
        folder.path,
        world_size=2,
        timeout_s=timeout_s,
        warn=told.warnings.append,
        note=told.notes.append,
        **{**usual, **keys},
    )


def events(steps: range) -> Iterator[Event]:
    for step in steps:
        yield RankStep(step, 0, 0.25, 0.5, None, 7, 8, memory_bytes=100)
        yield StepDone(step, step * 1.0, 3.0 - step, 0.5, 1e-3, 10, 99.0, 7, 8, 0.25, 0.5)
        yield RankStep(step, 1, 0.75, 0.0, None, 7, 8, temperature_c=60.0)
    yield EvalDone(steps[-1], 1.5, 20)
    yield Norms(steps[-1], {"head": 0.125})
    yield TextSample(steps[-1], "def ", "x")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    with fake_wandb() as fake:
        for name, value in fake.environment().items():
            monkeypatch.setenv(name, value)
        yield fake


def test_an_online_run_arrives_whole(server: FakeWandb, folder: RunFolder):
    told = train(folder, range(STEPS), group="sweep", tags=["a", "b"])
    ((name, run),) = server.runs.items()
    assert name == folder.run_id
    assert run.steps == list(range(STEPS))
    last = run.history[STEPS - 1]
    assert (last["train/loss"], last["eval/loss"]) == (3.0 - STEPS + 1, 1.5)
    assert (last["rank0/memory_bytes"], last["rank1/temperature_c"]) == (100, 60.0)
    assert last["norm/gradients/head"] == 0.125
    assert run.config["training"] == {"value": {"steps": STEPS}}
    assert run.config["model"] == {"value": {"name": "mlp", "api_key": "hidden"}}
    assert (run.asked["groupName"], run.asked["tags"]) == ("sweep", ["a", "b"])
    assert run.asked["project"] == "smolrun"
    assert run.summary["sample"] == "x"
    assert run.exit_codes == [0]
    assert told.warnings == []
    assert told.notes[-1:] == [f"W&B: {server.url}/me/smolrun/runs/{folder.run_id}"]
    assert all(KEY not in text for text in texts(folder)), "the key is nobody else's business"


def texts(folder: RunFolder) -> list[str]:
    return [path.read_text("latin-1") for path in folder.path.rglob("*") if path.is_file()]


def test_a_resumed_run_goes_on_in_the_same_one_without_doubled_steps(
    server: FakeWandb, folder: RunFolder
):
    train(folder, range(8))
    assert server.runs[folder.run_id].exit_codes == [1], "it has not come to its end"
    told = train(folder, range(5, STEPS))
    (run,) = server.runs.values()
    assert run.steps == list(range(STEPS))
    assert [run.history[line]["train/loss"] for line in range(STEPS)] == [
        3.0 - step for step in range(STEPS)
    ]
    assert run.exit_codes == [1, 0]
    assert told.warnings == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("down", "connection refused"),
        pytest.param("slow", "deadline exceeded", marks=pytest.mark.soak),
        ("500", "HTTP 500"),
        ("garbage", "invalid character"),
        ("denied", "invalid api key"),
    ],
)
def test_a_server_that_is_broken_leaves_an_offline_run_and_one_line(
    fault: str, reason: str, server: FakeWandb, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    if fault == "down":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    else:
        server.fault = fault  # type: ignore[assignment]
    # Importing W&B alone may take the usual grace on a busy machine; that an end is bounded is
    # proved below, with a process that never ends.
    monkeypatch.setattr("smolrun.tracking.wandb._GRACE_S", 60.0)
    told = train(folder, range(STEPS), timeout_s=0.5)
    (warning,) = told.warnings
    assert warning.startswith("W&B offline: ")
    assert reason in warning
    assert "to upload it later: wandb sync " in warning
    assert KEY not in warning
    assert history(synced_path(warning)) == list(range(STEPS))


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["upload_500", "upload_slow"])
def test_a_server_that_breaks_later_leaves_everything_on_the_disk(
    fault: Fault, server: FakeWandb, folder: RunFolder
):
    server.fault = fault
    told = train(folder, range(STEPS), timeout_s=1.0)
    assert told.close_s < 1.0 + 1.0 + 3.0 + 1.0
    (warning,) = told.warnings
    assert "did not take everything within 1 s" in warning
    assert history(synced_path(warning)) == list(range(STEPS))


def synced_path(sentence: str) -> Path:
    return Path(sentence.rpartition("wandb sync ")[2])


def history(part: Path) -> list[int]:
    """The steps in W&B's own file, as its own tool reads them."""
    (file,) = part.glob("run-*.wandb")
    rows = [record["history"]["item"] for record in inspect(file) if "history" in record]
    return [int(row["_step"]) for row in rows]


def inspect(file: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [wandb_command(), "leet", "inspect", "--json", str(file)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def wandb_command() -> str:
    found = shutil.which("wandb", path=str(Path(sys.executable).parent)) or shutil.which("wandb")
    assert found is not None
    return found


def test_nobody_logged_in_means_offline_with_a_hint_and_no_warning(folder: RunFolder):
    told = train(folder, range(STEPS))
    assert told.warnings == []
    assert told.notes[-1].startswith("W&B offline; to upload it: wandb sync ")
    assert history(synced_path(told.notes[-1])) == list(range(STEPS))


def test_online_without_a_key_says_so(folder: RunFolder):
    told = train(folder, range(STEPS), mode="online")
    assert "W&B offline: not logged in (run: wandb login)" in told.warnings[0]


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    "resumed",
    ["later", *(pytest.param(when, marks=pytest.mark.soak) for when in ("at once", "both killed"))],
)
def test_a_killed_run_that_is_resumed_offline_has_each_step_once(
    resumed: str, folder: RunFolder
) -> None:
    """A driver is killed. Its W&B process ends by itself; or still writes when the run is resumed;
    or was killed too, and only W&B's own file knows the last step."""
    metrics = JsonLines(folder.metrics)
    run = start(folder, Told(), mode="offline")
    for event in events(range(9)):
        metrics.record(event)
        run.record(event)
    metrics.close()
    until(lambda: has_begun(folder), 30)
    if resumed == "both killed":
        until(lambda: any(last_step_in(file)[0] >= 6 for file in wandb_files(folder)), 30)
        os.kill(run.pid, signal.SIGKILL)
        assert read_status(folder.path).last_step == -1  # type: ignore[union-attr]
    run._process.stdin.close()  # type: ignore[union-attr]  (as the end of a driver does)
    if resumed == "later":
        run._process.wait(30)
    earlier = ResumePoint(folder, folder.path, 5, 0.0, None, None, None, {})
    restore_folder(earlier, compose([]), lambda text: None, ExitStack())
    folder.write_config(f"training: {{steps: {STEPS}}}")
    train(folder, range(5, STEPS), mode="offline")
    parts = [history(file.parent) for file in wandb_files(folder)]
    assert len(parts) == 2
    assert sorted(step for part in parts for step in part) == list(range(STEPS))


ROWS = """
import subprocess, sys, time
for step in (3, 7, 5):
    print('{"type":"history","history":{"step":{"num":%d}}}' % step, flush=True)
"""


@pytest.mark.parametrize(
    ("end", "is_whole"),
    [
        ("", True),
        ("sys.exit(1)", False),
        ("""print('{"type":"history","his', end="")""", False),
        ("""subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])""", False),
    ],
)
def test_rows_that_are_not_all_there_are_known_to_be_so(
    end: str, is_whole: bool, tmp_path: Path
) -> None:
    """The command fails, its last row is cut, or a process that it started does not end."""
    limit_s = 1.0 if "sleep" in end else 60.0
    step, was_whole = last_step_written([sys.executable, "-c", ROWS + end], limit_s, tmp_path)
    assert was_whole == is_whole
    assert step == 7 or (limit_s == 1.0 and step < 7), "a slow machine has no row in a second"


def test_a_part_that_cannot_be_read_is_a_warning(folder: RunFolder) -> None:
    part = folder.path / "wandb" / "offline-run-x" / "run-x.wandb"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"no file of W&B's")
    write_status(folder.path, Status(state="offline"))
    (warning,) = train(folder, range(3), mode="offline").warnings
    assert "run-x.wandb cannot be read to its end" in warning
    assert "to upload it later: wandb sync " in warning


def has_begun(folder: RunFolder) -> bool:
    status = read_status(folder.path)
    return status is not None and status.pid > 0


def wandb_files(folder: RunFolder) -> list[Path]:
    return list(folder.path.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.timeout(90)
@pytest.mark.soak
def test_two_parts_of_an_offline_run_are_synced_into_one(
    folder: RunFolder, server: FakeWandb, monkeypatch: pytest.MonkeyPatch
):
    train(folder, range(8), mode="offline")
    told = train(folder, range(5, STEPS), mode="offline")
    parts = sorted(synced_path(told.notes[-1]).parent.glob("offline-run-*"))
    assert [history(part) for part in parts] == [list(range(8)), list(range(8, STEPS))]
    subprocess.run([wandb_command(), "sync", *map(str, parts)], check=True, timeout=60)
    assert server.runs[folder.run_id].steps == list(range(STEPS))


@pytest.mark.timeout(120)
@pytest.mark.soak
def test_offline_jobs_of_two_sweeps_are_synced_with_their_groups_and_names(
    tmp_path: Path, server: FakeWandb
):
    parts = []
    for sweep in ("20260131-142501-lr-3fa9", "20260131-142502-lr-3fa9"):
        for name in ("optimizer.lr=0.1,seed=1", "optimizer.lr=0.2,seed=1"):
            job = RunFolder(tmp_path / "sweeps" / sweep / name)
            job.logs.mkdir(parents=True)
            (job.path.parent / "sweep.yaml").touch()
            job.write_config(f"training: {{steps: {STEPS}}}\n")
            told = train(job, range(STEPS), mode="offline", group=sweep)
            parts.append(synced_path(told.notes[-1]))
    assert server.runs == {}
    subprocess.run([wandb_command(), "sync", *map(str, parts)], check=True, timeout=90)
    assert len(server.runs) == 4
    asked = [run.asked for run in server.runs.values()]
    assert sorted((one["groupName"], one["displayName"]) for one in asked) == sorted(
        (part.parents[2].name, part.parents[1].name) for part in parts
    )
    assert all(run.steps == list(range(STEPS)) for run in server.runs.values())


def test_a_process_that_stands_still_slows_nothing_and_is_ended(
    server: FakeWandb, folder: RunFolder
):
    told = Told()
    metrics = JsonLines(folder.metrics)
    run = start(folder, told, timeout_s=0.5)
    os.kill(run.pid, signal.SIGSTOP)
    many = list(events(range(3000)))
    began = time.monotonic()
    for event in many:
        metrics.record(event)
        run.record(event)
    assert time.monotonic() - began < SOON_S
    began = time.monotonic()
    run.close()
    assert time.monotonic() - began < SOON_S
    assert "did not finish in time; to upload it later: wandb sync" in told.warnings[0]
    with pytest.raises(ProcessLookupError):
        os.kill(run.pid, 0)


def test_a_process_that_dies_is_told_at_the_end(folder: RunFolder):
    told = Told()
    JsonLines(folder.metrics).close()
    run = start(folder, told)
    os.kill(run.pid, signal.SIGKILL)
    for event in events(range(3)):
        run.record(event)
    run.close()
    assert len(told.warnings) == 1
    assert "did not finish in time" in told.warnings[0]


def test_a_driver_that_dies_lets_the_run_come_to_its_end(server: FakeWandb, folder: RunFolder):
    script = f"""
import os, signal
from pathlib import Path
from tests.tracking.test_wandb import Told, events, start
from smolrun.tracking.jsonl import JsonLines
from smolrun.tracking.run_folder import RunFolder
folder = RunFolder(Path({str(folder.path)!r}))
metrics = JsonLines(folder.metrics)
run = start(folder, Told())
for event in events(range(4)):
    metrics.record(event)
    run.record(event)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=False, timeout=30)

    def is_over() -> bool:
        status = read_status(folder.path)
        return status is not None and status.state == "done"

    until(is_over, 20)
    assert server.runs[folder.run_id].steps == list(range(4))
