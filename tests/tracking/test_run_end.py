from __future__ import annotations

import io

import pytest

from smolrun.tracking.console import Console
from smolrun.tracking.run_end import RunEnd, bar

SHARES = [
    (0.6, "computing"),
    (0.25, "waiting for rank 1 (1.6x slower)"),
    (0.0, "pipeline bubble"),
    (0.15, "network (4.7 MB a step, 34 MB/s)"),
    (0.003, "other (data, evaluation, saving)"),
]
LONG = "smolrun checkpoint.resume=/a/very/long/path/of/a/run/that/no/terminal/has/room/for/x-3fa9"
END = RunEnd(
    status="done",
    headline="done: 300 steps in 0:00:41 (0:00:49 from start to end)",
    figures=[("loss", "3.2145"), ("perplexity", "24.9"), ("tokens/s", "14,921")],
    shares=SHARES,
    advice="try quantization=int8",
    time_line="where the time went: 60 % computing",
    notes=[("run folder", "outputs/x-3fa9")],
    prompt="def f(",
    samples=[("sample", "x):\n    return\x1b[2J")],
    commands=[("to train longer", LONG)],
)


def test_plain_lines() -> None:
    assert list(END.lines()) == [
        "done: 300 steps in 0:00:41 (0:00:49 from start to end), loss 3.2145, perplexity 24.9, "
        "14,921 tokens/s",
        "where the time went: 60 % computing",
        "sample:\ndef f(x):\n    return\x1b[2J",
        "run folder: outputs/x-3fa9",
        f"to train longer: {LONG}",
    ]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class AsciiTerminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [20, 80, 140])
@pytest.mark.parametrize("has_colours", [False, True])
def test_in_a_terminal_nothing_is_cut_at_any_width(
    columns: int, has_colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    (monkeypatch.delenv if has_colours else monkeypatch.setenv)("NO_COLOR", *_args(has_colours))
    stream = Terminal()
    Console(steps=1, world_size=2, stream=stream).show_end(END)
    shown = stream.getvalue()
    assert ("\x1b[32m" in shown) is has_colours
    assert "\x1b[2J" not in shown  # what a model writes does not command the terminal
    texts = [text for share, text in SHARES if share > 0.1]
    for text in ("3.2145", "24.9", "14,921", "try quantization=int8", "outputs/x-3fa9", *texts):
        assert text in shown
    assert LONG in shown  # in one piece, so that it can be copied
    assert "pipeline bubble" not in shown and "other" not in shown
    # The signs differ, for those who see no colours.
    assert all(sign in shown for sign in "█▓░")


def _args(has_colours: bool) -> tuple[object, ...]:
    return (False,) if has_colours else ("1",)


def test_prose_is_wrapped_beside_the_labels_and_commands_are_not() -> None:
    notes = [("learnt", "how these texts sound, not what they say")]
    end = RunEnd("done", "done", notes=notes, advice="try this " * 4, commands=[("next", LONG)])
    rows = [row.plain for row in end.rows(50, has_blocks=True)]
    assert rows[3:5] == [
        "  learnt           how these texts sound, not",
        "                   what they say",
    ]
    assert all(len(row) <= 50 for row in rows[:-1]) and rows[-1].endswith(LONG)


@pytest.mark.parametrize("width", [1, 7, 60])
def test_the_bar_is_as_long_as_the_shares_together(width: int) -> None:
    drawn = bar(SHARES, width, "abcde").plain
    assert len(drawn) == width
    assert abs(drawn.count("a") - 0.6 * width) <= 1
    assert drawn == "".join(sorted(drawn))


def test_a_terminal_that_has_only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = AsciiTerminal(io.BytesIO(), encoding="ascii")
    Console(steps=1, world_size=2, stream=stream).show_end(END)
    stream.flush()
    shown = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "#" in shown and "60 % computing" in shown and "outputs/x-3fa9" in shown
    assert r"\ufffd[2J" in shown


def test_a_question_and_its_answer() -> None:
    end = RunEnd("done", "done", prompt="Hi?", samples=[("answer", "Hello.")], is_answer=True)
    assert list(end.lines())[1:] == ["prompt: Hi?", "answer: Hello."]
    rows = [row.plain for row in end.rows(80, has_blocks=True)]
    assert [row.split() for row in rows[:2]] == [["prompt", "Hi?"], ["answer", "Hello."]]


def test_the_same_prompt_before_and_after() -> None:
    samples = [("sample before", " a time"), ("sample after", " the sea")]
    end = RunEnd("done", "done", prompt="Once upon", samples=samples)
    assert list(end.lines())[1:] == [
        "sample before:\nOnce upon a time",
        "sample after:\nOnce upon the sea",
    ]
    shown = [row.plain for row in end.rows(80, has_blocks=True)]
    assert shown[:4] == [
        "sample before, the prompt in bold:",
        "  Once upon a time",
        "sample after, the prompt in bold:",
        "  Once upon the sea",
    ]
