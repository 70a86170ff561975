"""What a person sees: lines in a file, a bar in a terminal, and never an error."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest

from smolrun.events import (
    EvalDone,
    Event,
    GradientDropped,
    Note,
    RankStep,
    RunStarted,
    StepDone,
    StepSkipped,
)
from smolrun.sanitize import printable
from smolrun.tracking.console import Console, slowest
from smolrun.tracking.formatting import clock, named


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, *, time_s: float, loss: Any = 2.5) -> StepDone:
    return StepDone(number, time_s, loss, 1.0, 0.1, 8, 5120.4, 0, 0, 0.1, 0.0)


def rank_step(rank: int, compute_s: float) -> RankStep:
    return RankStep(0, rank, compute_s, 0.0, None, 0, 0)


def lines_of(
    *events: Event,
    steps: int = 100,
    world_size: int = 2,
    batch_size: int | None = 32,
    unit: str = "tokens",
) -> list[str]:
    stream = io.StringIO()
    console = Console(steps=steps, world_size=world_size, batch_size=batch_size, stream=stream)
    console.unit = unit
    for event in events:
        console.record(event)
    console.close()
    return stream.getvalue().splitlines()


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    events = [step(number, time_s=float(number)) for number in range(12)]
    lines = lines_of(*events, steps=12)
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/12",
        "step 6/12",
        "step 11/12",
        "step 12/12",
    ]
    assert lines[1] == "step 6/12  loss 2.5000  9.6 tokens/s  0:00:05 left"


def test_speed_is_a_mean_since_the_last_line() -> None:
    events = [step(number, time_s=time_s) for number, time_s in enumerate([2.0, 9.0, 9.001, 12.0])]
    stream = io.StringIO()
    console = Console(steps=4, world_size=1, stream=stream)
    console.unit = "samples"
    for event in events:
        console.record(event)
    speeds = [line.split("  ")[2] for line in stream.getvalue().splitlines()]
    assert speeds == ["4.0 samples/s", "1.1 samples/s", "5.3 samples/s"]


def test_one_is_singular() -> None:
    (line,) = lines_of(RunStarted(1, 1, 2, 3, "cpu"), world_size=1, batch_size=1)
    assert "on 1 rank (cpu): 1 step of 1 sequence; " in line
    assert [named([1]), named([0, 1, 2])] == ["rank 1", "ranks 0, 1 and 2"]


def test_what_a_run_uses_is_not_taken_for_what_there_is() -> None:
    (line,) = lines_of(RunStarted(9, 40, 8_000, 1_000, "cpu"), unit="samples")
    assert line.endswith("40 steps of 32 samples; train 8,000 / eval 1,000 samples")
    (line,) = lines_of(RunStarted(9, 40, 0, 1_000, "cpu"))
    assert line.endswith("40 steps of 32 sequences; train a stream / eval 1,000 samples")
    (line,) = lines_of(RunStarted(9, 40, 8_000, 1_000, "cpu"), batch_size=None)
    assert line.endswith("40 steps; train 8,000 / eval 1,000 samples")


def test_events_as_sentences() -> None:
    assert lines_of(
        RunStarted(1_115_264, 20, 27_886, 1_516, "cpu"),
        EvalDone(9, 1.5, 8),
        StepSkipped(4, [0, 1]),
        *(GradientDropped(so_far + 10, 2, so_far) for so_far in range(1, 6)),
        Note("warning", "[red] is no markup :smile:", rank=1),
        Note("debug", "not for people"),
    ) == [
        "training 1,115,264 parameters on 2 ranks (cpu): 20 steps of 32 sequences; "
        "train 27,886 / eval 1,516 samples",
        "after step 10: evaluation loss 1.5000",
        "step 5 is skipped: no finite gradient on ranks 0 and 1",
        "step 12 continues without rank 2: its gradient is late and will be dropped",
        "step 13 continues without rank 2: its gradient is late and will be dropped, 2 so far",
        "step 15 continues without rank 2: its gradient is late and will be dropped, 4 so far",
        "warning: [red] is no markup :smile: (rank 1)",
    ]


def test_a_loss_that_is_no_number_arrives_as_null_and_is_told() -> None:
    (line,) = lines_of(step(0, time_s=0.1, loss=None))
    assert "loss not a number" in line


def test_the_slowest_rank_is_named_when_it_is_clearly_slower() -> None:
    (line,) = lines_of(rank_step(0, 0.1), rank_step(1, 0.2), step(0, time_s=0.2))
    assert line.endswith("slowest: rank 1")
    (line,) = lines_of(rank_step(0, 0.1), rank_step(1, 0.105), step(0, time_s=0.2))
    assert "slowest" not in line
    stream = io.StringIO()
    console = Console(steps=9, world_size=2, names_slowest=False, stream=stream)
    for event in (rank_step(0, 0.1), rank_step(1, 0.2), step(0, time_s=0.2)):
        console.record(event)
    assert "slowest" not in stream.getvalue(), "nobody waits for it"
    assert slowest({}) is None
    assert slowest({0: 1.0}) is None
    assert slowest({0: 0.0, 1: 0.0}) is None


def test_data_is_told_once_per_kind_of_work() -> None:
    stream = io.StringIO()
    console = Console(steps=1, world_size=1, stream=stream)
    for done in range(50):
        console.preparing("reading text", done, 50)
    console.preparing("encoding text", 0, 0)
    assert stream.getvalue() == "preparing: reading text\npreparing: encoding text\n"


def test_a_terminal_gets_a_bar_and_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    console = Console(steps=2, world_size=1, stream=stream)
    console.preparing("reading text", 1, 2)
    console.record(step(0, time_s=0.5))
    console.say("in between")
    console.record(step(1, time_s=1.0))
    console.close()
    shown = stream.getvalue()
    assert "reading text" in shown
    assert "2/2" in shown
    assert "loss 2.5000  16 tokens/s" in shown
    assert "in between" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


@pytest.mark.parametrize(
    ("columns", "figures"),
    [
        (40, "loss 2.5000"),
        (80, "loss 2.5000  0.0 tokens/s  0:25:00 left"),
        (120, "loss 2.5000  0.0 tokens/s  0:25:00 left  slowest: rank 1"),
    ],
)
def test_the_bar_fits_into_the_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int, figures: str
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    console = Console(steps=30_000, world_size=2, stream=stream)
    for event in (rank_step(0, 0.1), rank_step(1, 0.2), step(9999, time_s=750.0)):
        console.record(event)
    console.close()
    text = re.sub(r"\x1b\[[?\d;]*\w", "", stream.getvalue())
    line = [line for line in re.split(r"[\r\n]", text) if line.strip()][-1].rstrip()
    found = re.fullmatch(rf"training (.*) 10000/30000 {figures}", line)
    assert found is not None, text
    assert 6 <= len(found[1]) <= 40
    assert len(line) <= columns


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")

    def shown() -> str:
        stream = Terminal()
        console = Console(steps=2, world_size=1, stream=stream)
        console.record(step(0, time_s=0.5))
        console.record(step(1, time_s=1.0))
        console.close()
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[38;" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38;" not in shown()


def test_of_millions_of_bytes_the_share_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    console = Console(steps=2, world_size=1, stream=stream)
    console.preparing("fetching", 46_450_000, 92_900_000)
    console.preparing("reading", 5, 610)
    console.close()
    assert " 50%" in stream.getvalue() and "/610" in stream.getvalue()
    assert "92900000" not in stream.getvalue()


def test_the_last_step_promises_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    console = Console(steps=1, world_size=1, stream=stream)
    console.record(step(0, time_s=0.5))
    console.close()
    assert "tokens/s" in stream.getvalue() and "left" not in stream.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    console = Console(steps=2, world_size=1, stream=stream)
    console.record(step(0, time_s=0.5))
    console.close()
    assert stream.getvalue() == "step 1/2  loss 2.5000  16 tokens/s  0:00:00 left\n"


def test_a_stream_that_is_gone_is_no_error() -> None:
    stream = io.StringIO()
    console = Console(steps=2, world_size=1, stream=stream)
    stream.close()
    console.preparing("reading", 0, 1)
    console.record(step(0, time_s=0.5))
    console.say("nobody hears this")
    console.close()


def test_the_log_gets_all_lines_but_a_ranks_own_also_where_nobody_sees_them() -> None:
    stream, heard = io.StringIO(), list[str]()
    console = Console(steps=2, world_size=1, stream=stream)
    console.log = heard.append
    console.say("warning: one")
    stream.close()
    console.record(Note("warning", "of a rank, which has it in its own log", rank=1))
    console.record(Note("error", "two"))
    console.say("three")
    assert heard == ["warning: one", "error: two", "three"]


def test_a_reader_that_has_left_does_not_spoil_the_exit_code() -> None:
    code = (
        "from smolrun.tracking.console import Console\n"
        "console = Console(steps=1, world_size=1)\n"
        "for _ in range(100_000): console.say('x' * 100)\n"
        "console.close()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, complaints = process.communicate(timeout=50)
    assert (process.returncode, complaints) == (0, b"")


def test_an_encoding_that_lacks_a_letter_is_no_error() -> None:
    raw = io.BytesIO()
    console = Console(steps=1, world_size=1, stream=io.TextIOWrapper(raw, encoding="ascii"))
    console.say("gr\u00fc\u00dfe \u4e16")
    console.say("plain")
    console.close()
    assert raw.getvalue().splitlines() == [b"gr\\xfc\\xdfe \\u4e16", b"plain"]


def test_what_a_model_writes_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\tc") == "a\ufffd[2Jb\ufffd\ufffd\n\tc"


def test_clock() -> None:
    assert [clock(s) for s in (-1, 0, 65.4, 3661)] == ["0:00:00", "0:00:00", "0:01:05", "1:01:01"]
