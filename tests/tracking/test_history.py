"""What a metrics file said before: samples, events, and positions by time, of any file."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from smolrun.tracking.history import last_step, offset_at, past
from smolrun.tracking.run_view import Request, answer
from tests.tracking.test_past_runs import a_run
from tests.ui.made import HOSTILE, JOINED, SAVED, STEP_S, lines, step_done, training, write


def test_a_short_file_is_all_recent(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    write(folder, training(0, 10))
    found = past(folder.metrics)
    assert (found.begin, found.steps, found.events) == (0, [], [])
    assert found.file == folder.metrics.stat().st_ino


def test_a_longer_one_has_all_its_steps_and_its_events(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    write(folder, [*training(0, 4), JOINED, *training(4, 10), SAVED, *training(10, 800)])
    found = past(folder.metrics)
    rest = folder.metrics.read_bytes()[found.begin :]
    assert rest.startswith(b'{"event": ') and rest.count(b"\n") > 500
    assert [step.step for step in found.steps] == list(range(len(found.steps)))
    first_left = step_done(len(found.steps))
    assert lines([first_left])[0].encode() in rest
    assert [(at, '"membership"' in line) for at, line in found.events] == [(4, True), (10, False)]


def big(file: Path, size: int) -> int:
    """A file of that size, most of it a hole, with steps at its begin, in its middle and its end;
    returns its last step."""
    block = "".join(f"{row}\n" for row in lines(training(0, 2000))).encode()
    later = "".join(f"{row}\n" for row in lines(training(9000, 11000))).encode()
    with file.open("wb") as out:
        for place, data in ((0, block), (size - len(later), later)):
            out.seek(place)
            out.write(data)
        out.seek(size // 2)
        out.write(b"\n" + b"".join(f"{row}\n".encode() for row in lines(training(5000, 5100))))
    return 10999


def test_of_a_gigabyte_little_is_read(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    newest = big(folder.metrics, 1 << 30)
    tracemalloc.start()
    began = time.process_time()
    view = answer(Request(str(folder.path), reads=True, history=True))
    took_s = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert view.past is not None and len(view.past.steps) <= 256
    assert view.metrics.lines[-1] == lines([step_done(newest)])[0]
    assert took_s < 2.0 and peak < 40 << 20, (took_s, peak)


def test_a_file_that_is_damaged_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for data in (
        b"",
        b"\n\n",
        b"{",
        os.urandom(3 << 20),
        b"x" * (3 << 20),
        b'{"event": "step"' * 9999,
    ):
        file.write_bytes(data)
        found = past(file)
        assert found.steps == [] and found.begin <= len(data)
        assert last_step(file) is None
        assert offset_at(file, 10.0) == 0
    assert past(tmp_path / "nothing") == past(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert past(tmp_path / "pipe").file == 0


def test_a_position_by_time(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    write(folder, training(0, 3000))
    size = folder.metrics.stat().st_size
    assert offset_at(folder.metrics, 0.0) == 0
    assert offset_at(folder.metrics, 1e9) == size
    for step in (0, 1, 7, 1499, 2998):
        place = offset_at(folder.metrics, STEP_S * (step + 1) + 0.1)
        before, after = (
            folder.metrics.read_bytes()[:place],
            folder.metrics.read_bytes()[place:],
        )
        assert before.endswith(b"\n") and lines([step_done(step)])[0].encode() in before
        assert lines([step_done(step + 1)])[0].encode() in after
    found = last_step(folder.metrics)
    assert found is not None and (found.step, found.time_s) == (2999, 1500.0)


@pytest.mark.parametrize("cut", [2, 40, 200])
def test_the_last_line_is_cut(tmp_path: Path, cut: int) -> None:
    folder = a_run(tmp_path)
    write(folder, training(0, 1500))
    os.truncate(folder.metrics, folder.metrics.stat().st_size - cut)
    found = last_step(folder.metrics)
    assert found is not None and found.step == 1498
    assert offset_at(folder.metrics, 1e9) <= folder.metrics.stat().st_size


def test_events_of_hostile_text_are_kept_as_they_are_written(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    folder.metrics.write_text(f"{HOSTILE}\n")
    write(folder, training(0, 1500))
    assert past(folder.metrics).events == [(0, HOSTILE)]
