"""What is read of a run folder, also of a damaged or hostile one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from smolrun.comparison import run_figures
from smolrun.comparison.run_figures import read_run
from tests.comparison.runs import TOKENS, config, events, write_run


def test_the_figures_of_a_run(tmp_path: Path):
    rows = [*events(), {"event": "eval", "step": 19, "loss": 3.5, "accuracy": None}]
    rows += [{"event": "timeline", "step": 5, "rank": 0, "spans": []}]
    peaks = {"peak_memory_bytes": [5000, 6000]}
    run = read_run(write_run(tmp_path / "a", rows=rows, summary=peaks))
    assert (run.state, run.steps, run.world_size, run.version) == ("done", 20, 2, "0.1.0")
    assert run.tokens_per_s == pytest.approx(TOKENS)
    assert run.bytes_sent == 20 * 2 * 100
    assert run.peak_memory_bytes == 6000
    assert (run.train_loss, run.eval_loss, run.wall_s) == (pytest.approx(3.1), 3.5, 30.0)
    assert run.ranks[1].compute_s == pytest.approx(10) and run.ranks[1].network_s == pytest.approx(
        5
    )
    # 16 samples are 1,000 tokens; each rank makes 8 of them in half a second of computing.
    assert run.own_speeds == pytest.approx(2000)
    assert run.config["algorithm.bucket_mb"] == "4" and run.config["cluster.hosts"] == "null"
    assert run.emulated == () and run.problems == []


def test_waiting_for_a_slower_rank_is_not_the_network(tmp_path: Path):
    rows = events(steps=4)
    for row in rows:
        if row.get("rank") == 1:
            row.update(compute_s=0.7, wait_s=0.05)
    run = read_run(write_run(tmp_path / "a", rows=rows))
    assert run.ranks[0].behind_s == pytest.approx(4 * 0.2)
    assert run.ranks[0].network_s == pytest.approx(4 * 0.05)
    assert run.ranks[1].behind_s == 0


def test_a_gradient_that_is_dropped_was_computed_all_the_same(tmp_path: Path):
    rows = events(steps=4, ranks=1)
    push = {"step": 0, "rank": 0, "ticket": 0}
    rows += [{"event": "push", **push, "version": 0, "age": 1, "samples": 8}] * 4
    rows += [{"event": "push_dropped", **push, "reason": "late"}] * 4
    run = read_run(write_run(tmp_path / "a", rows=rows))
    assert run.ages == {1: 4}
    assert run.own_speeds == pytest.approx(
        2 * read_run(write_run(tmp_path / "b", rows=events(steps=4, ranks=1))).own_speeds
    )


def test_thinned_rows_count_as_often_as_they_stand_for(tmp_path: Path):
    rows = events(steps=10)
    note = {"event": "note", "rank": None, "level": "info"}
    note["message"] = "rank_step and push rows: from here on those of every 2 steps only"
    kept = [row for row in events(steps=20)[30:] if row["event"] == "step" or row["step"] % 2 == 0]
    run = read_run(write_run(tmp_path / "a", rows=[*rows, note, *kept]))
    assert run.bytes_sent == 20 * 2 * 100
    assert run.ranks[0].compute_s == pytest.approx(10)


def test_a_run_that_was_resumed_writes_all_rows_again(tmp_path: Path):
    note = {"event": "note", "rank": None, "level": "info"}
    note["message"] = "rank_step and push rows: from here on those of every 2 steps only"
    started = {"event": "started", "rank": None, "parameters": 1}
    rows = [*events(steps=10), note, started, *events(steps=20)[30:]]
    run = read_run(write_run(tmp_path / "a", rows=rows))
    assert run.bytes_sent == 20 * 2 * 100


def test_a_run_that_still_trains(tmp_path: Path):
    folder = write_run(tmp_path / "a", summary={})
    folder.write_driver(steps=100)
    with folder.metrics.open("a") as file:
        file.write('{"event": "step", "step": 20, "time_s": 21.0, "lo')
    run = read_run(folder)
    assert (run.state, run.steps, run.wall_s) == ("running", 20, None)
    assert run.problems == []  # half a line is no damage
    with folder.metrics.open("a") as file:
        file.write('ss": 1.0, "tokens": 1000}\n')
    assert read_run(folder).steps == 21


def test_a_run_without_metrics_and_a_job_that_has_not_started(tmp_path: Path):
    folder = write_run(tmp_path / "a", rows=[])
    folder.metrics.unlink()
    run = read_run(folder)
    assert (run.state, run.tokens_per_s, run.bytes_sent) == ("done", None, None)
    assert run.problems == ["there is no metrics.jsonl"]
    folder = write_run(tmp_path / "b", rows=[], summary={})
    folder.metrics.unlink()
    assert read_run(folder).state == "not started"


def test_emulation_is_known_before_the_end(tmp_path: Path):
    hosts = [{"name": "pi", "emulate": {"compute": 0.25}}, {"name": "mac", "emulate": None}]
    run = read_run(write_run(tmp_path / "a", config(cluster__hosts=hosts), summary={}))
    assert run.emulated == ("pi emulates a slower machine",)


def test_times_of_almost_nothing_make_no_speed(tmp_path: Path):
    rows = events(step_s=1e-300)
    run = read_run(write_run(tmp_path / "a", rows=rows))
    assert (run.tokens_per_s, run.own_speeds, run.speed_spread) == (None, None, None)


def test_what_a_run_made_twice_counts_once(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", rows=[*events(), *events(steps=5)]))
    assert (run.steps, run.tokens) == (20, 20 * TOKENS)
    assert len(run.curve.points) == 20


LINES = [
    b"\xff\xfe\x00",
    b"[]",
    b'{"event": "step", "step": NaN, "time_s": 1}',
    b'{"event": "step", "step": "1", "time_s": 1}',
    b'{"event": "step", "step": 1, "time_s": 1e400}',
    b'{"event": "step", "step": 99, "time_s": 99, "loss": "0.1"}',
    b'{"event": "step", "step": 99, "time_s": 99, "loss": 1e300}',
    b'{"event": "step", "step": 1e300, "time_s": 99}',
    b'{"event": "rank_step", "step": 1, "rank": 999999}',
    b'{"event": "rank_step", "step": 1, "rank": -1}',
    b'{"event": "rank_step", "step": 1, "rank": 0, "bytes_sent": -5}',
    b'{"event": "push", "age": 1e99}',
    b"[" * 100_000,
    b'{"event": ' * 5000,
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:60])
def test_a_damaged_line_is_left_out_and_counted(tmp_path: Path, line: bytes):
    folder = write_run(tmp_path / "a")
    good = folder.metrics.read_bytes()
    folder.metrics.write_bytes(line + b"\n" + good)
    run = read_run(folder)
    assert (run.steps, run.bytes_sent) == (20, 4000)
    assert run.problems == ["1 lines of metrics.jsonl cannot be read"]


def test_a_line_without_an_end_fills_no_memory(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    good = folder.metrics.read_bytes()
    folder.metrics.write_bytes(b'{"event": "' + b"x" * (5 << 20) + b'"}\n' + good)
    assert read_run(folder).steps == 20


def test_of_a_huge_file_only_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_figures, "MAX_METRICS_BYTES", 5000)
    run = read_run(write_run(tmp_path / "a", rows=events(steps=500)))
    assert 0 < run.steps < 20
    assert "only the first" in run.problems[0]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(8)
)
LONG = f"a: &a {'x' * 500_000}\nb: [{','.join(['*a'] * 50_000)}]\n"
CONFIGS = [
    "", "- 1\n", "text", ": : :", "a: !!python/object/apply:os.system ['touch hacked']\n",
    "a: &a [*a]\n", "[" * 5000, "? {a: 1}\n: 2\n", "a: 2026-13-45\n", "1: 2\nnull: 3\n",
    "a: .nan\nb: .inf\nc: 1e999\nd: 123456789012345678901234567890\n", "a: !!binary aGk=\n",
    "a: \"${oc.env:HOME}\"\n", "\x00", BOMB, LONG,
]  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: repr(text[:30]))
def test_a_hostile_configuration_is_data_or_unknown(tmp_path: Path, text: str):
    folder = write_run(tmp_path / "a")
    folder.config.write_text(text)
    began = time.monotonic()
    run = read_run(folder)
    assert time.monotonic() - began < 20
    assert run.steps == 20
    assert not (tmp_path / "hacked").exists() and not Path("hacked").exists()
    assert all(len(key) <= 250 and len(value) <= 250 for key, value in run.config.items())
    assert "HOME" not in text or run.config["a"] == "${oc.env:HOME}"


@pytest.mark.parametrize(
    "summary",
    [
        {"status": "done", "wall_s": "1", "peak_memory_bytes": ["a", -1, 1e300, None]},
        {"status": "done", "world_size": -1, "versions": [], "emulated": "yes", "time": 3},
        {"status": "done", "world_size": 1e300, "versions": {"smolrun": {}}, "emulated": [1, None]},
        {"status": ["done"], "final_eval_loss": True, "reason": {"a": 1}},
    ],
)
def test_a_hostile_summary_is_unknown(tmp_path: Path, summary: dict[str, Any]):
    folder = write_run(tmp_path / "a")
    (folder.path / "summary.json").write_text(json.dumps(summary))
    run = read_run(folder)
    assert run.steps == 20
    assert run.wall_s is None and run.version is None and run.eval_loss is None
    assert run.peak_memory_bytes == 1001  # as the rows say


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFO and no /dev/zero")
def test_files_that_are_none_do_not_block(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    folder.metrics.unlink()
    os.mkfifo(folder.metrics)
    assert read_run(folder).problems == ["metrics.jsonl cannot be read (LimitPassed)"]
    folder.metrics.unlink()
    folder.metrics.symlink_to("/dev/zero")
    folder.config.unlink()
    os.mkfifo(folder.config)
    assert len(read_run(folder).problems) == 2


def test_texts_are_one_line_without_what_a_terminal_obeys(tmp_path: Path):
    evil = "\x1b]0;x\x07\u202egnp\nB"
    folder = write_run(tmp_path / "a", {"model": {"name": evil, evil: evil}})
    run = read_run(folder, evil)
    texts = [run.name, *run.config, *run.config.values()]
    assert all(text.isprintable() for text in texts)


def test_secrets_of_a_configuration_stay_there(tmp_path: Path):
    hosts = [{"name": "pi", "env": {"HF_TOKEN": "s3cret"}}]
    run = read_run(write_run(tmp_path / "a", config(cluster__hosts=hosts, data__api_key="s3cret")))
    assert "s3cret" not in str(run.config)
