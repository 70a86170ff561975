"""The table of task=bench, which has to fit into a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from smolrun.tasks.bench import _table
from smolrun.tracking.console import Screen


def rows(op: str, peer: str, seconds: float, **size: Any) -> list[dict[str, Any]]:
    row = {"op": op, "peer": peer, "world_size": 4, "ours_s": seconds, "peer_s": 1.1 * seconds}
    return [row | size | {"ratio": 0.93, "spread": (0.81, 1.22), "cpu_ratio": 1.02}]


@pytest.mark.parametrize(
    ("measured", "cells"),
    [
        (rows("all_reduce", "gloo", 0.123, bytes=67_108_864), "67,108,864 B 123 ms gloo 135 ms"),
        (rows("step", "ddp-fp16", 9.3, parameters=135e6), "135.0 M 9,300 ms ddp-fp16 10.2 s"),
        (
            [
                *rows("staleness 2", "simulation", 123.4, bytes=8),
                *rows("edp", "simulation", 1.0, bytes=8),
            ],
            "staleness 2, 123.4 s simulation 135.7 s",
        ),
    ],
)
def test_no_number_is_cut_at_80_columns(measured: list[dict[str, Any]], cells: str):
    shown = io.StringIO()
    Console(file=shown, width=80).print(_table(measured))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    wanted = f"4 {cells} 0.93 0.81 to 1.22 1.02"
    assert wanted in [" ".join(line.split()) for line in lines]


def test_what_rank_0_calls_its_rows_is_text_and_neither_markup_nor_control_characters():
    shown = io.StringIO()
    named = [
        *rows("[red]op[/]", "[link=x]peer\x1b]0;t\x07", 1.0, bytes=8),
        *rows("[/]", "b\n", 1.0),
    ]
    Screen(file=shown, width=200).print(_table(named))
    for text in ("[red]op[/], 8 B", "[link=x]peer ]0;t", "[/], 0.0 M"):
        assert text in shown.getvalue()
    assert "\x1b" not in shown.getvalue()
