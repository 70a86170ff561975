"""checkpoint.resume of a run folder that this account did not write: nothing of it runs unasked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
import pytest

from smolrun.cli import resume
from smolrun.cli.arguments import Arguments
from smolrun.cli.compose import compose, composing
from smolrun.cli.run import checked, run
from smolrun.config import RunConfig, resolved
from smolrun.errors import ConfigError
from smolrun.tracking.run_folder import RunFolder

RUN = "20260131-142501-x-aaaa"
ASK = [f"checkpoint.resume={RUN}", "training.dry_run=true"]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as it comes out of an archive; its code would leave this file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    mark = tmp_path / "ran"
    Path("foreign_code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    plain = resolved(
        compose(["model.target=foreign_code:build", "checkpoint.trust_run_folder=true"])
    )
    folder = RunFolder(Path("outputs") / RUN)
    folder.path.mkdir(parents=True)
    folder.config.write_bytes(msgspec.yaml.encode(plain))
    yield mark
    sys.modules.pop("foreign_code", None)


def test_without_a_terminal_it_is_refused_and_nothing_runs(
    ran: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(ASK) == 2
    said = capsys.readouterr().err
    assert "checkpoint.trust_run_folder=true" in said
    assert 'model.target = "foreign_code:build"' in said
    assert not ran.exists()


@pytest.mark.parametrize("answer", ["", "n", "yes!", EOFError])
def test_anything_but_yes_is_a_no(ran: Path, monkeypatch: pytest.MonkeyPatch, answer: Any):
    def respond(prompt: str) -> str:
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr(resume, "is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", respond)
    assert run(ASK) == 2
    assert not ran.exists()


def test_a_link_out_of_the_folder_is_refused_before_anything_is_written(ran: Path, tmp_path: Path):
    folder = RunFolder(Path("outputs") / RUN)
    (tmp_path / "precious").write_text("all I have")
    (folder.path / "metrics.jsonl").symlink_to(tmp_path / "precious")
    before = folder.config.read_bytes()
    assert run([*ASK, "checkpoint.trust_run_folder=true"]) == 2
    assert folder.config.read_bytes() == before
    assert (tmp_path / "precious").read_text() == "all I have"
    assert not ran.exists()


def test_a_damaged_key_is_named_in_the_question(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    key = tmp_path / "config" / "smolrun" / "run_folders.key"
    key.parent.mkdir(parents=True)
    key.touch()
    assert run(ASK) == 2
    assert f"{key}, the key that signs run folders" in capsys.readouterr().err


def test_the_question_shows_all_that_is_run_or_connected_to():
    host = {"ssh": "me@a", "python": "/x/python", "workdir": "/x", "env": {"LD_PRELOAD": "secret"}}
    stored = {
        "cluster": {"python": "/y", "workdir": "/z", "ssh_config": "s", "hosts": [{"name": "a"}]},
        "model": {"target": "smolrun.models.mlp:build", "loss": "theirs:loss"},
        "data": {"target": "smolrun.data.digits:load"},
        "algorithm": {"target": ["smolrun"]},
        "tracker": {"entity": "them"},
    }
    stored["cluster"]["hosts"].append(host)
    assert set(resume._runs_or_connects(stored)) == {
        'cluster.python = "/y"',
        'cluster.workdir = "/z"',
        'cluster.ssh_config = "s"',
        'cluster.hosts[1].ssh = "me@a"',
        'cluster.hosts[1].python = "/x/python"',
        'cluster.hosts[1].workdir = "/x"',
        'cluster.hosts[1].env = ["LD_PRELOAD"]',
        'model.loss = "theirs:loss"',
        'data.target = "smolrun.data.digits:load"',
        'algorithm.target = ["smolrun"]',
        'tracker.entity = "them"',
    }
    assert list(resume._runs_or_connects(resolved(compose(["model=mlp", "data=digits"])))) == []


def further(*overrides: str) -> RunConfig:
    """The configuration of a new run of the model of an earlier one."""
    found = Arguments([f"model.run={RUN[-4:]}", *overrides])
    with composing(found):
        return checked(found)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    folder = RunFolder(Path("outputs") / RUN)
    folder.path.mkdir(parents=True)
    plain = resolved(
        compose(["model.layers=2", "data=shakespeare", "data.max_mb=1", "seed=9", "optimizer=sgd"])
    )
    folder.write_config(msgspec.yaml.encode(plain).decode())
    return folder


def test_a_new_run_has_the_model_and_data_of_the_earlier_one(trained: RunFolder):
    config = further("data.sequence_length=16", "training.steps=7")
    assert (config.model.name, config.model.keywords()["layers"]) == ("gpt_tiny", 2)
    data = config.data.keywords()
    assert (config.data.name, data["max_mb"], data["sequence_length"]) == ("shakespeare", 1, 16)
    assert (config.seed, config.training.steps) == (0, 7)
    assert config.optimizer.name == "adamw" and config.optimizer.lr == 1e-4
    assert (config.checkpoint.weights, config.checkpoint.resume) == (RUN, None)


def test_a_new_run_can_have_other_data(trained: RunFolder):
    config = further("data=python_stdlib", "optimizer=sgd")
    assert (config.data.name, config.optimizer.name) == ("python_stdlib", "sgd")
    assert config.model.keywords()["layers"] == 2
    config = further("data=text", "data.path=letters", "data.max_mb=2")
    data = config.data.keywords()
    assert (config.data.name, data["path"], data["max_mb"]) == ("text", "letters", 2)


def test_the_run_is_pinned_as_it_is_now(trained: RunFolder):
    trained.become_latest()
    found = Arguments(["model.run=latest"])
    with composing(found):
        assert checked(found).checkpoint.weights == RUN
    (trained.checkpoints / "step-00000001").mkdir(parents=True)
    at = f"{trained.path}/checkpoints/step-00000001"
    found = Arguments([f"model.run={at}"])
    with composing(found):
        assert checked(found).checkpoint.weights == at.removeprefix("outputs/")


def test_keys_of_another_version_are_completed_or_named(trained: RunFolder):
    plain = msgspec.yaml.decode(trained.config.read_text())
    del plain["model"]["rope_theta"]
    trained.write_config(msgspec.yaml.encode(plain).decode())
    assert further().model.keywords()["rope_theta"] == 10000.0
    plain["model"]["new_gates"] = 3
    trained.write_config(msgspec.yaml.encode(plain).decode())
    trained.write_summary({"versions": {"smolrun": "99.0"}})
    with pytest.raises(ConfigError) as caught:
        further()
    assert "model.new_gates = 3: no such key" in caught.value.problems[0]
    reason = f"outputs/{RUN}/config.yaml was written by smolrun 99.0, this is "
    assert reason in caught.value.problems[1]


def test_own_code_of_a_foreign_run_is_not_loaded_for_a_new_run_either(ran: Path):
    for keys in ([], ["data=digits"]):
        with pytest.raises(ConfigError, match=r"model.run = .*trust_run_folder=true"):
            further(*keys)
    assert not ran.exists()
    assert further("checkpoint.trust_run_folder=true").model.target == "foreign_code:build"


def test_a_yes_is_asked_for_once(ran: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(resume, "is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "y")
    for _ in range(2):
        run(ASK)
        assert ran.exists() and len(asked) == 1
    # A line that is changed afterwards is no longer what was trusted.
    config = RunFolder(Path("outputs") / RUN).config
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    run(ASK)
    assert len(asked) == 2


def test_the_key_stands_for_a_yes(ran: Path):
    run([*ASK, "checkpoint.trust_run_folder=true"])
    assert ran.exists()
    assert RunFolder(Path("outputs") / RUN).has_own_config()
