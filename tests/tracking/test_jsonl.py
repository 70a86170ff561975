"""metrics.jsonl: the keys that other programs read, in the order that people expect."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from smolrun.events import EVENTS, EvalDone, Note, RankStep, ReplicaHash, StepDone
from smolrun.tracking.jsonl import JsonLines, forget_from, line, trained_tokens

STEP = StepDone(12, 3.21, 2.31, 0.9, 3e-4, 8192, 5120.0, 123, 124, 0.1, 0.2)


def test_a_step_has_the_keys_of_the_design() -> None:
    assert line(STEP).startswith(b'{"event": "step", "step": 12, "rank": null, "time_s": 3.21')
    assert json.loads(line(STEP)) == {
        "event": "step",
        "step": 12,
        "rank": None,
        "time_s": 3.21,
        "loss": 2.31,
        "grad_norm": 0.9,
        "lr": 3e-4,
        "tokens": 8192,
        "tokens_per_s": 5120.0,
        "bytes_sent": 123,
        "bytes_received": 124,
        "compute_s": 0.1,
        "wait_s": 0.2,
    }


def test_what_a_rank_cannot_tell_is_null() -> None:
    row = json.loads(line(RankStep(3, 1, 0.1, 0.2, 0, 10, 20)))
    assert (row["event"], row["step"], row["rank"], row["waited_for"]) == ("rank_step", 3, 1, 0)
    assert row["temperature_c"] is None
    assert row["throttled"] is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_every_line_is_json_even_with_numbers_that_json_lacks(loss: float) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(line(EvalDone(1, loss, 8)), parse_constant=refuse)["loss"] is None


def test_every_event_is_one_line_whatever_text_it_holds() -> None:
    assert line(Note("warning", "two\nlines \u2028 here", rank=1)).count(b"\n") == 1
    assert {"step", "rank_step", "eval", "replica_hash"} <= set(EVENTS)


def test_lines_are_in_the_file_at_once_and_a_resumed_run_goes_on_in_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    first.record(STEP)
    assert path.read_bytes() == line(STEP)  # not closed: a driver may be killed here
    first.close()
    second = JsonLines(path)
    second.record(ReplicaHash(12, ["ab", "ab"]))
    second.close()
    assert [json.loads(row)["event"] for row in path.read_text().splitlines()] == [
        "step",
        "replica_hash",
    ]


def test_a_run_that_goes_on_forgets_the_steps_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"event": "started", "steps": 9},
        *({"event": event, "step": step} for step in range(5) for event in ("step", "rank_step")),
        {"event": "note", "message": "step"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "step", "st')
    forget_from(path, 3)
    kept = [json.loads(row) for row in path.read_text().splitlines()]
    assert kept == [row for row in rows if row.get("step", 0) < 3]
    JsonLines(path).record(EvalDone(3, 1.0, 2))
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 3
    forget_from(tmp_path / "not there", 3)


def test_a_long_run_keeps_all_its_steps_and_ever_fewer_rows_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolrun.tracking.jsonl._THIN_BYTES", 10_000)
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(2000):
        for rank in range(2):
            file.record(RankStep(step, rank, 0.1, 0.2, 0, 10, 20))
        file.record(msgspec.structs.replace(STEP, step=step))
    file.close()
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [*range(2000)]
    told = [row["step"] for row in rows if row["event"] == "rank_step"]
    assert len(told) < 400 and set(told) >= {0, 1, 2}
    assert told[-1] > 1900 and {told.count(step) for step in set(told[-20:-2])} == {2}
    assert any(row["event"] == "note" and "every 2 steps" in row["message"] for row in rows)


def test_a_rank_0_that_never_stops_telling_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolrun.tracking.jsonl.MAX_METRICS_BYTES", 10 * len(line(STEP)))
    file = JsonLines(tmp_path / "metrics.jsonl")
    for _ in range(10):
        file.record(STEP)
    with pytest.raises(OSError, match="has 0 GiB"):
        file.record(STEP)
    file.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == 10 * len(line(STEP))


def test_the_tokens_of_a_run_are_those_of_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert trained_tokens(path) == 0
    rows = [line(STEP), line(RankStep(12, 1, 0.1, 0.2, 0, 10, 20)), b"half a li\n", line(STEP)]
    path.write_bytes(b"".join(rows))
    assert trained_tokens(path) == 2 * 8192
