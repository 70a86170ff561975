from __future__ import annotations

import pytest

from smolrun.launch.remote.connection import error_tail


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([b""], "no output"),
        ([b" \n", b"out\n"], "out"),
        ([b"a\nlast \n", b"out"], "last"),
        ([b"\xff!\n"], "\ufffd!"),
        ([b"x" * 1000], "x" * 300),
    ],
)
def test_last_words(outputs: list[bytes], words: str):
    assert error_tail(*outputs) == words


def test_nobody_paints_on_our_terminal():
    assert error_tail("\x1b[2J\x07wiped\u202e\n".encode()) == "[2J wiped"
