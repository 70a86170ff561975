from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from smolrun.tracking.past_runs import bytes_below, look, run_folders, starting
from smolrun.tracking.run_folder import RunFolder


def a_run(outputs: Path, name: str = "20260131-142501-x-aaaa", steps: int = 100) -> RunFolder:
    folder = RunFolder(outputs / name)
    folder.path.mkdir(parents=True)
    folder.write_config(f"training:\n  steps: {steps}\n")
    return folder


def step(number: int, **changes: Any) -> str:
    event = {"event": "step", "step": number, "rank": None, "time_s": 0.5 * (number + 1)}
    return json.dumps({**event, "loss": 3.25, "tokens": 1000, **changes}) + "\n"


def write_steps(folder: RunFolder, *numbers: int) -> None:
    with folder.metrics.open("a") as file:
        file.writelines(step(number) for number in numbers)


def change_driver(folder: RunFolder, **changes: Any) -> None:
    file = folder.path / "driver.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_running_run(tmp_path: Path):
    folder = a_run(tmp_path)
    folder.write_driver(steps=200)
    write_steps(folder, *range(41))
    run = look(folder)
    assert folder.driver_lives()
    assert (run.state, run.step, run.steps, run.loss) == ("running", 41, 200, 3.25)
    assert run.tokens_per_s == pytest.approx(2000)
    assert run.left_s == pytest.approx(159 * 0.5)
    assert run.may_be_running


def test_the_run_that_has_not_begun_to_train_yet(tmp_path: Path):
    assert starting(tmp_path) is None
    trained = a_run(tmp_path, "20260131-142501-x-aaaa")
    trained.become_latest()
    failed = a_run(tmp_path, "20260131-142502-x-bbbb")
    failed.write_driver(steps=200)
    failed.write_summary({"status": "failed"})
    assert starting(tmp_path) is None
    begins = a_run(tmp_path, "20260131-142503-x-cccc")
    begins.write_driver(steps=200)
    server = a_run(tmp_path, "20260131-142504-serve-dddd")
    server.write_driver(steps=0)
    assert starting(tmp_path) == begins
    begins.become_latest()
    assert starting(tmp_path) is None


def test_a_run_before_its_first_step(tmp_path: Path):
    folder = a_run(tmp_path)
    folder.write_driver(steps=200)
    run = look(folder)
    assert (run.state, run.step, run.steps, run.loss, run.left_s) == (
        "running",
        None,
        200,
        None,
        None,
    )


@pytest.mark.parametrize("status", ["done", "stopped", "failed"])
def test_an_ended_run(tmp_path: Path, status: str):
    folder = a_run(tmp_path)
    folder.write_driver(steps=100)
    write_steps(folder, 98, 99)
    folder.write_summary({"status": status})
    run = look(folder)
    assert (run.state, run.step, run.steps, run.left_s) == (status, 100, 100, None)
    assert not folder.driver_lives()  # although the process that is named does live


def test_a_run_that_goes_on_after_its_end(tmp_path: Path):
    folder = a_run(tmp_path)
    folder.write_summary({"status": "stopped"})
    old = time.time() - 100
    os.utime(folder.path / "summary.json", (old, old))
    folder.write_driver(steps=100)
    assert folder.summary() == {}
    assert look(folder).state == "running"


def test_a_run_whose_driver_died(tmp_path: Path):
    folder = a_run(tmp_path)
    code = (
        "import sys; from pathlib import Path; from smolrun.tracking.run_folder import RunFolder;"
        "RunFolder(Path(sys.argv[1])).write_driver(5); print(flush=True); sys.stdin.read()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, folder.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert driver.stdout is not None
    driver.stdout.readline()
    assert look(folder).state == "running"
    driver.kill()
    # Nobody has waited for it yet: a zombie is dead too.
    deadline = time.monotonic() + 10
    while psutil.Process(driver.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
    assert look(folder).state == "died"
    driver.communicate()
    assert look(folder).state == "died"
    assert look(folder).steps == 5


def test_a_number_of_a_process_that_was_given_again(tmp_path: Path):
    folder = a_run(tmp_path)
    folder.write_driver(steps=5)
    change_driver(folder, process_created=psutil.Process().create_time() - 60)
    assert look(folder).state == "died"


@pytest.mark.parametrize("pid", [None, "1", -1, 2**40, {}])
def test_a_driver_that_is_nonsense(tmp_path: Path, pid: Any):
    folder = a_run(tmp_path)
    folder.write_driver(steps=5)
    change_driver(folder, pid=pid)
    assert look(folder).state == "died"


def test_a_run_of_another_host(tmp_path: Path):
    folder = a_run(tmp_path)
    folder.write_driver(steps=5)
    change_driver(folder, host=f"not-{platform.node()}")
    assert look(folder).state == "elsewhere"
    assert look(folder).may_be_running
    old = time.time() - 7200
    os.utime(folder.path / "driver.json", (old, old))
    assert look(folder).state == "died"
    write_steps(folder, 1)
    assert look(folder).state == "elsewhere"


def test_a_bench(tmp_path: Path):
    folder = a_run(tmp_path)
    (folder.path / "bench.jsonl").touch()
    assert look(folder).state == "bench"


def test_only_the_end_of_the_metrics_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = a_run(tmp_path)
    with folder.metrics.open("wb") as file:
        file.truncate(1 << 40)  # a hole of a terabyte
        file.seek(0, os.SEEK_END)
        file.write(("\n" + step(7) + step(8)).encode())
    assert look(folder).step == 9


def test_a_step_far_from_the_end_is_found(tmp_path: Path):
    folder = a_run(tmp_path)
    write_steps(folder, 7)
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"event": "note", "message": "x" * 200_000}) + "\n")
    assert look(folder).step == 8


@pytest.mark.parametrize(
    "line",
    ['{"event": "step", "st', "null", "[]", "\xff", "{}", '{"event": "step", "step": "9"}', ""],
)
def test_a_damaged_last_line_is_passed_over(tmp_path: Path, line: str):
    folder = a_run(tmp_path)
    write_steps(folder, 7)
    with folder.metrics.open("a", encoding="latin-1") as file:
        file.write(line)
    assert look(folder).step == 8


def test_nothing_known_is_no_error(tmp_path: Path):
    folder = a_run(tmp_path, name="not-by-us")
    for name in ("config.yaml", "summary.json", "driver.json", "metrics.jsonl"):
        (folder.path / name).write_text("{: [")
    run = look(folder)
    assert (run.state, run.step, run.steps, run.loss) == ("died", None, None, None)
    with folder.metrics.open("w") as file:
        file.write(step(3, loss=None, time_s=None, tokens=None))
        for damage in ({"time_s": "x"}, {"step": -1}, {"step": 10**400}, {"tokens": [1]}):
            file.write(json.dumps({**json.loads(step(4)), **damage}) + "\n")
    assert (look(folder).step, look(folder).loss, look(folder).tokens_per_s) == (4, None, None)


def test_runs_newest_first(tmp_path: Path):
    for name in ("20260131-142501-b-aaaa", "20260201-142501-a-aaaa", "20250131-142501-c-aaaa"):
        folder = a_run(tmp_path, name)
        folder.become_latest()
    (tmp_path / "not a run").mkdir()
    (tmp_path / "a file").touch()
    (tmp_path / "linked").symlink_to(folder.path)
    assert [run.run_id[16] for run in run_folders(tmp_path)] == ["a", "b", "c"]
    assert run_folders(tmp_path / "nowhere") == []


def test_bytes_of_a_folder(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"1" * 1000)
    (tmp_path / "big").write_bytes(b"1" * 5000)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "big")
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    assert 1000 <= bytes_below(tmp_path / "a") < 2000
    assert bytes_below(tmp_path / "big") == 5000
    assert bytes_below(tmp_path / "gone") == 0
