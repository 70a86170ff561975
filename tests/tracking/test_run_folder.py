"""The folder of a run: names, the pointer to the newest, and files that are whole or not there."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
import pytest

from smolrun.errors import SmolrunError
from smolrun.tracking.run_folder import RunFolder, is_signed, run_id, sign

NOW = datetime(2026, 1, 31, 14, 25, 1)


def test_a_run_id_tells_when_and_what() -> None:
    assert run_id("classicdp-gpt_tiny", now=NOW, suffix="3fa9") == (
        "20260131-142501-classicdp-gpt_tiny-3fa9"
    )


def test_a_folder_is_made_with_its_logs(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "outputs", "single-mlp", now=NOW)
    assert re.fullmatch(r"20260131-142501-single-mlp-[0-9a-f]{4}", folder.run_id)
    assert folder.path == tmp_path / "outputs" / folder.run_id
    assert folder.logs.is_dir()
    assert folder.log(2, "mini3") == folder.logs / "rank2-mini3.log"


def test_names_are_file_names_on_every_system(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "../my run: 50%", now=NOW)
    assert folder.path.parent == tmp_path
    assert re.fullmatch(r"20260131-142501-\.\._my_run_50_-[0-9a-f]{4}", folder.run_id)
    assert folder.log(0, "user@fe80::1/../x").name == "rank0-user_fe80_1_.._x.log"


def test_two_runs_of_one_second_get_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffixes = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(secrets, "token_hex", lambda size: next(suffixes))
    names = {RunFolder.create(tmp_path, "x", now=NOW).run_id for _ in range(2)}
    assert names == {"20260131-142501-x-aaaa", "20260131-142501-x-bbbb"}


def test_latest_points_to_the_newest(tmp_path: Path) -> None:
    for title in ("first", "second"):
        folder = RunFolder.create(tmp_path, title, now=NOW)
        folder.become_latest()
    latest = tmp_path / "latest"
    assert latest.is_symlink()
    assert latest.resolve() == folder.path
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_latest_is_a_text_file_where_links_are_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for title in ("first", "second"):
        folder = RunFolder.create(tmp_path, title, now=NOW)
        folder.become_latest()
    assert (tmp_path / "latest").read_text() == f"{folder.run_id}\n"


def test_files_of_the_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "outputs", "x", now=NOW)
    folder.write_config("seed: 1\n")
    folder.write_summary({"status": "done", "final_train_loss": math.nan})
    for name in ("tokenizer.json", "chat_template.jinja", "data.safetensors"):
        (tmp_path / name).write_text("{}")
    folder.keep_tokenizer(tmp_path)
    kept = {path.name for path in (folder.path / "tokenizer").iterdir()}
    assert kept == {"tokenizer.json", "chat_template.jinja"}
    assert (folder.path / "config.yaml").read_text().startswith("seed: 1\n# signature: ")
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary == {"status": "done", "final_train_loss": None}
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"config.yaml", "summary.json", "tokenizer", "logs"}


def test_a_stop_holds_when_its_driver_begins_the_run_again(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "outputs", "run", now=NOW)
    folder.write_driver(9)
    folder.ask_to_stop()
    folder.write_driver(9)
    assert folder.stop_requests() == 1
    driver = json.loads((folder.path / "driver.json").read_text())
    (folder.path / "driver.json").write_text(json.dumps({**driver, "process_created": 1.0}))
    folder.write_driver(9)
    assert folder.stop_requests() == 0


def test_who_drives_it_is_believed_only_if_this_account_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def use_account(name: str) -> Path:
        config = tmp_path / name
        monkeypatch.setattr(platformdirs, "user_config_path", lambda app: config / app)
        return config / "smolrun" / "run_folders.key"

    key = use_account("me")
    folder = RunFolder(tmp_path)
    assert folder.remote() is None and not folder.is_driven_elsewhere
    folder.write_remote({"folder": "/there", "python": "/usr/bin/python3"})
    assert folder.remote() == {"folder": "/there", "python": "/usr/bin/python3"}
    if os.name == "posix":
        assert key.stat().st_mode & 0o777 == 0o600
    use_account("somebody_else")
    assert folder.remote() is None and folder.is_driven_elsewhere
    use_account("me")
    assert folder.remote() is not None
    file = tmp_path / "remote.json"
    file.write_bytes(file.read_bytes().replace(b"/usr/bin", b"/srv/bin"))
    assert folder.remote() is None
    file.write_text("[" * 100_000)
    assert folder.remote() is None


def test_a_configuration_is_known_again_by_the_account_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use_account(name: str) -> None:
        monkeypatch.setattr(platformdirs, "user_config_path", lambda _: tmp_path / name)

    use_account("mine")
    folder = RunFolder(tmp_path)
    folder.write_config("seed: 0\n")
    assert folder.has_own_config()
    folder.write_config(folder.config.read_text())  # as an undo does
    assert folder.has_own_config() and folder.config.read_text().count("signature") == 1
    assert msgspec.yaml.decode(folder.config.read_bytes()) == {"seed": 0}
    use_account("other")
    assert not folder.has_own_config()
    use_account("mine")
    folder.config.write_text(folder.config.read_text().replace("0", "1", 1))
    assert not folder.has_own_config()


def test_an_account_without_a_key_writes_runs_that_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(platformdirs, "user_config_path", lambda _: tmp_path / "file" / "below")
    folder = RunFolder(tmp_path)
    folder.write_config("seed: 0\n")
    assert folder.config.read_text() == "seed: 0\n"
    with pytest.raises(SmolrunError, match=r"run_folders\.key"):
        folder.has_own_config()


@pytest.mark.parametrize("last", ["a # signature: b", "a\n# signature: " + "0" * 64, ""])
def test_only_the_last_line_is_a_signature(tmp_path: Path, last: str) -> None:
    folder = RunFolder(tmp_path)
    config = {"training": {"sample_prompt": "# signature: " + "0" * 64}, "z": last}
    for _ in range(2):
        folder.write_config(msgspec.yaml.encode(config).decode())
        assert msgspec.yaml.decode(folder.config.read_bytes()) == config
        assert folder.has_own_config()
    with folder.config.open("a") as file:
        file.write("seed: 1\n")
    assert not folder.has_own_config()


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    precious = tmp_path / "precious"
    precious.write_text("all I have")
    (folder.path / ".config.yaml.part").symlink_to(precious)
    folder.write_config("seed: 0\n")
    assert precious.read_text() == "all I have"
    assert not folder.config.is_symlink() and folder.has_own_config()


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the key will be; there is none yet."""
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / name)
    return tmp_path / "smolrun" / "run_folders.key"


def test_a_process_that_ends_while_it_writes_leaves_no_key(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_bytes = secrets.token_bytes

    def end(size: int) -> bytes:
        if size == 32:
            raise KeyboardInterrupt
        return random_bytes(size)

    with monkeypatch.context() as patched:
        patched.setattr(secrets, "token_bytes", end)
        with pytest.raises(KeyboardInterrupt):
            sign(b"")
    assert not key.exists()
    assert is_signed(b"a", sign(b"a"))
    assert list(key.parent.iterdir()) == [key]


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_key_of_another_length_is_an_error(key: Path, content: bytes) -> None:
    key.parent.mkdir()
    key.write_bytes(content)
    with pytest.raises(SmolrunError, match="does not have 32 bytes: delete it"):
        sign(b"")
    assert key.read_bytes() == content


def test_the_key_of_another_process_stays(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It creates one between our look and our link."""
    link = os.link

    def second(source: Path, target: Path) -> None:
        key.write_bytes(b"x" * 32)
        link(source, target)

    monkeypatch.setattr(os, "link", second)
    sign(b"")
    assert key.read_bytes() == b"x" * 32


def test_a_file_system_without_hard_links_has_a_key(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert is_signed(b"a", sign(b"a"))
    assert list(key.parent.iterdir()) == [key]
    if os.name == "posix":
        assert key.stat().st_mode & 0o777 == 0o600
