"""Text from elsewhere on its way to a terminal: not obeyed, and no line of it begins as ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from smolrun.cli import run as cli
from smolrun.cli.compose import compose
from smolrun.errors import HostError
from smolrun.events import Membership, Note
from smolrun.sanitize import (
    all_in_one_line,
    echo,
    indented,
    one_line,
    without_credentials,
    without_secrets,
)
from smolrun.tasks import attach, clean, status
from smolrun.tracking.console import Console
from smolrun.tracking.run_folder import RunFolder

# Clears the screen, sets the title (by OSC and by C1), goes to the line's start, turns the text.
EVIL = "a\x1b[2J\x1b]0;title\x07\x9b2J\x9d0;title\x9c\rOURS \x08\x7f\u202eevil\u2066\u2028\x85\n"
EVIL += "OURS: a line of its own\n\x0bOURS\x0cOURS"


def is_harmless(shown: str) -> bool:
    lines = shown.split("\n")
    return all(line.isprintable() for line in lines) and not any(
        line.startswith("OURS") for line in lines
    )


def test_text_of_others():
    assert is_harmless(indented(EVIL))
    assert is_harmless(one_line(EVIL))
    assert "\n" not in one_line(EVIL)
    assert indented("a\nb") == "a\n  b"
    assert all_in_one_line({"a\n": ["\x1b", {"b": 1.5}], "c": None}) == {
        "a ": [" ", {"b": 1.5}],
        "c": None,
    }


def test_what_is_printed_is_printable(capsys: pytest.CaptureFixture[str]):
    echo("a\x1b[2J\n\u202eb")
    echo("\x9b", error=True)
    shown = capsys.readouterr()
    assert shown.out == "a\ufffd[2J\n\ufffdb\n"
    assert shown.err == "\ufffd\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pa@ss@index/simple", "https://***@index/simple"),
        ("see https://token@a/x, https://b/x and http://u:p@c", 3),
        ("https://index/@user?x=a@b", "https://index/@user?x=a@b"),
        ("me@host:22", "me@host:22"),
    ],
)
def test_credentials_of_urls_are_hidden(text: str, shown: str | int):
    if shown == 3:
        shown = "see https://***@a/x, https://b/x and http://***@c"
    assert without_credentials(text) == shown


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder as an archive may bring it, failed; its name is EVIL, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clean.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    folder = RunFolder(Path("outputs") / f"20260131-142501-{EVIL}")
    folder.path.mkdir(parents=True)
    folder.write_config(json.dumps({"training": {"steps": EVIL}}))
    (folder.checkpoints / "step-00000001.part-x").mkdir(parents=True)
    folder.write_driver(steps=3, unit=EVIL, has_log=True)
    folder.driver_log.write_text(EVIL)
    folder.metrics.write_text(f"{EVIL}\n" + json.dumps({"event": "note", "message": EVIL}) + "\n")
    folder.write_summary({"status": "failed", "reason": EVIL, "checkpoint": EVIL})
    return folder


def show_attached(folder: RunFolder) -> None:
    attach.drive(compose(["task=attach", "attach.run=latest"]))


def show_followed(folder: RunFolder) -> None:
    """While it was running."""
    from smolrun.driver.runs import opened
    from smolrun.tracking.run_view import Request

    with opened(folder) as run:
        view = run.ask(Request("", reads=True))
        attach.Show(run, view).follow(view)


def show_status(folder: RunFolder) -> None:
    status.drive(compose(["task=status"]))


def show_clean(folder: RunFolder) -> None:
    clean.drive(compose(["task=clean"]))


def test_secrets_in_the_configuration_are_hidden():
    config = {
        "model": {"api_key": "x", "hub_token": "y", "heads": 2, "target": "a:b"},
        "training": {"sample_tokens": 5, "sample_prompt": "def "},
        "list": [{"password": "z"}],
        "data": {"tokenizer": "bpe"},
    }
    assert without_secrets(config) == {
        "model": {"api_key": "hidden", "hub_token": "hidden", "heads": 2, "target": "a:b"},
        "training": {"sample_tokens": 5, "sample_prompt": "def "},
        "list": [{"password": "hidden"}],
        "data": {"tokenizer": "bpe"},
    }


@pytest.mark.parametrize("show", [show_attached, show_followed, show_status, show_clean])
def test_a_hostile_run_folder_is_shown_harmlessly(
    hostile: RunFolder, show: Callable[[RunFolder], None], capsys: pytest.CaptureFixture[str]
):
    hostile.become_latest()
    show(hostile)
    shown = capsys.readouterr()
    assert "evil" in shown.out
    # A line of the run's own log may begin as it likes: attach shows nothing but that.
    own = shown.out.replace("\nOURS: a line of its own", "") if show is show_followed else shown.out
    assert is_harmless(own), own
    assert is_harmless(shown.err), shown.err


@pytest.mark.parametrize("error", [HostError("box", EVIL, EVIL), HostError(EVIL, "x")])
def test_an_error_of_a_host_is_shown_harmlessly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: HostError
):
    def drive(config: object) -> int:
        raise error

    monkeypatch.setattr(status, "drive", drive)
    assert cli.drive(compose(["task=status"])) == 3
    shown = capsys.readouterr()
    assert "evil" in shown.err
    assert is_harmless(shown.out + shown.err)


def test_a_value_of_a_configuration_is_shown_harmlessly(capsys: pytest.CaptureFixture[str]):
    assert cli.run([f"data.path='{EVIL}'", "data=text", f"run_name='{EVIL}'"]) == 2
    assert is_harmless(capsys.readouterr().err)


def test_an_event_of_a_rank_is_shown_harmlessly(capsys: pytest.CaptureFixture[str]):
    console = Console(steps=1, world_size=1)
    console.record(Note(EVIL, EVIL, 1))
    console.record(Membership(step=1, rank=1, is_here=False, reason=EVIL, tickets=1))
    console.preparing(EVIL, 1, 2)
    console.say(EVIL)
    shown = capsys.readouterr().out
    assert shown.count("evil") == 5
    assert is_harmless(shown)
