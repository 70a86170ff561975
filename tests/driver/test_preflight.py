"""What is told before any rank starts: own code that does not fit, devices that are not there."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from smolrun import cli
from smolrun.checkpoints.folder import commit, part_folder
from smolrun.checkpoints.manifest import merge
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard
from smolrun.cli.compose import compose
from smolrun.data.prepared import Prepared
from smolrun.driver import preflight
from smolrun.driver.fleet import own_targets
from smolrun.driver.preflight import (
    check_before_start,
    check_weights,
    memory_warning,
    stages_note,
    template_note,
)
from smolrun.driver.prepare import spec_of
from smolrun.errors import ConfigError
from smolrun.estimate import dry_run
from smolrun.estimate.stages import model_maker
from smolrun.launch.machine_memory import MachineMemory
from smolrun.tasks import train
from tests.tasks.test_whole_runs import finish, start, summary

NAMES = (f"own_code_before_start_{number}" for number in itertools.count())
BUILD = "def build(spec, *, width, depth=1): ...\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that no other test has imported, for a file in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return next(NAMES)


def problems(*overrides: str) -> list[str]:
    config = compose(overrides)
    with pytest.raises(ConfigError) as error:
        check_before_start(config)
    return error.value.problems


def test_own_code_that_fits_is_fine(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(BUILD)
    check_before_start(compose([f"model.target={module}:build", "model.width=5"]))


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        (
            BUILD,
            ["model.width=1", "model.dept=2"],
            "model.dept = 2: {}:build takes no such key; "
            "allowed: width, depth; did you mean model.depth?",
        ),
        (BUILD, [], "model.width: must be given, {}:build needs it"),
        ("x = 1\n", [], "model.target = {}:build: cannot be loaded (AttributeError: "),
        ("build = 1\n", [], "model.target = {}:build: neither a function nor a class"),
        ("import nothing_of_this_name\n", [], "cannot be loaded (ModuleNotFoundError: No module"),
        ("1 / 0\n", [], "model.target = {}:build: cannot be loaded (ZeroDivisionError: "),
        ("def build(): ...\n", [], "cannot be called with its keys: too many positional"),
    ],
)  # fmt: skip  (a case a line)
def test_own_code_that_does_not_fit_is_told(
    module: str, tmp_path: Path, text: str, overrides: list[str], line: str
) -> None:
    (tmp_path / f"{module}.py").write_text(text)
    (found,) = problems(f"model.target={module}:build", *overrides)
    assert line.format(module) in found


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("loss = 1\n", "model.loss = {}:loss: neither a function nor a class"),
        ("def loss(logits): ...\n", "cannot be called as loss(logits, targets): too many"),
        ("def loss(logits, targets, k): ...\n", "as loss(logits, targets): missing a required"),
        ("1 / 0\n", "model.loss = {}:loss: cannot be loaded (ZeroDivisionError: "),
        ("def loss(logits, targets, k=1): ...\n", ""),
    ],
)
def test_an_own_loss_that_does_not_fit_is_told(
    module: str, tmp_path: Path, text: str, line: str
) -> None:
    (tmp_path / f"{module}.py").write_text(text)
    own = compose([f"model.loss={module}:loss"])
    assert own_targets(own) == [f"{module}:loss"], "it travels to the hosts"
    found = problems(f"model.loss={module}:loss") if line else []
    assert [line.format(module) in one for one in found] == [True] * bool(line)
    if not line:
        check_before_start(own)


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert problems("cluster.device=cuda")[0].startswith(
        "cluster.device = cuda: torch finds no such device on this machine; allowed: auto or cpu"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_before_start(compose(["cluster.device=cuda"]))


def test_a_device_of_another_machine_is_not_looked_for_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    there, here = "{name: a, ssh: a, device: cuda}", "{name: b, address: 10.0.0.1, device: cuda}"
    check_before_start(compose([f"cluster.hosts=[{there}]"]))
    assert "no such device" in problems(f"cluster.hosts=[{there},{here}]")[0]


def test_a_template_with_its_examples_is_told(tmp_path: Path) -> None:
    said = template_note(compose(["cluster=macmini3"])) or ""
    assert said.startswith("note: cluster=macmini3 is a template: mini1, mini2, mini3 are examples")
    assert template_note(compose(["cluster=macmini3", "cluster.hosts.1.ssh=me@mini2"])) is None
    assert template_note(compose(["cluster=sim/pi3"])) is None, "emulated here, it runs as it is"
    assert template_note(compose([])) is None


@pytest.mark.soak
def test_a_run_with_a_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n\n\n"
        "def build(spec, *, width):\n"
        "    return nn.Sequential(\n"
        "        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)\n"
        "    )\n"
    )
    wanted = ["model.target=my_net:build", "model.width=8", "data=digits", "training.steps=3"]
    code, _, err = finish(start(tmp_path, *wanted))
    assert code == 0, err
    assert summary(tmp_path)["steps"] == 3
    code, _, err = finish(start(tmp_path, *wanted, "model.widht=9"))
    assert code == 2
    assert "did you mean model.width?" in err


def test_a_secret_by_its_name_does_not_travel_as_a_variable() -> None:
    config = compose(["cluster.hosts=[{name: a, ssh: a, env: {HF_TOKEN: hf_0, HF_HOME: /big}}]"])
    with pytest.raises(ConfigError) as refusal:
        check_before_start(config)
    (line,) = refusal.value.problems
    assert line.startswith("cluster.hosts[0].env.HF_TOKEN")
    assert "hf_0" not in line


def prepared(tokens: int) -> Prepared:
    return Prepared("tokens", "", "", 32_000, None, tokens, None, 1, 1, "")


def test_weights_of_another_shape_or_for_another_vocabulary_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["checkpoint.weights=a-run", "model.width=32", "model.heads=2", "model.layers=1"]

    def check(vocabulary: int, *overrides: str) -> None:
        data = msgspec.structs.replace(prepared(64), num_outputs=vocabulary)
        check_weights(compose([*sizes, *overrides]), data, checkpoint)

    model = model_maker(compose(sizes), msgspec.structs.replace(prepared(64), num_outputs=100))()
    part = part_folder(tmp_path / "outputs" / "a-run" / "checkpoints", 7, "t")
    named = model.state_dict().items()
    report = write_shard(part, 0, [TensorSlice.whole(f"model/{name}", at) for name, at in named])
    manifest = merge([report], step=7, run_id="r", config_hash="c", world_size=1, state={})
    checkpoint = commit(part, manifest)
    check(100)
    check(100, "training.recompute=true", "algorithm=fsdp", "precision=bf16")
    for vocabulary, change, what in [
        (90, "seed=1", r"weight is \(100, 32\) there, \(90, 32\) here"),
        (100, "model.width=64", r"weight is \(100, 32\) there, \(100, 64\) here"),
        (100, "model.layers=2", "is missing there, "),
    ]:
        with pytest.raises(ConfigError, match=rf"model.run = a-run: .*{what}"):
            check(vocabulary, change)
    (tmp_path / "outputs" / "a-run" / "config.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"\(100, 32\) there, \(256, 32\) here"):
        train.drive(compose([*sizes, "data.tokenizer=bytes", "training.dry_run=true"]))


def warning(monkeypatch: pytest.MonkeyPatch, free_gb: float, *overrides: str) -> str | None:
    """What a run is warned of on a machine with so much free memory."""
    free = MachineMemory(2**40, int(free_gb * 2**30), 0)
    for module in (preflight, dry_run):
        monkeypatch.setattr(module, "machine_memory", lambda: free)
    return memory_warning(compose(overrides), prepared(64))


def test_a_run_that_does_not_fit_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    line = warning(monkeypatch, 1.0, "cluster.ranks=4")
    assert line is not None
    assert line.startswith("does not fit: local needs ")
    assert line.endswith("; training.dry_run=true says what would make it fit")


def test_a_host_with_too_little_memory_is_known_by_its_memory_gb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "mini1 needs " in (
        warning(monkeypatch, 99, "cluster=macmini3", "cluster.memory_gb=16", "model=llama32_1b")
        or ""
    )


def test_a_limit_below_what_the_model_needs_is_told_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = warning(monkeypatch, 64.0, "cluster.memory_gb=0.5")
    assert line is not None
    assert line.startswith("does not fit: local needs ")
    assert "of 512 MB" in line
    assert warning(monkeypatch, 64.0, "cluster.memory_gb=8") is None


def test_a_run_that_fits_is_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "estimate", None)
    assert warning(monkeypatch, 8.0) is None


def test_a_run_that_only_a_generous_sum_calls_too_large_is_not_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = compose(["model=gpt_small"])
    assert 2 * preflight._generous_bytes(config, prepared(64)) > 4 * 2**30
    assert warning(monkeypatch, 4.0, "model=gpt_small") is None


@pytest.mark.parametrize(
    "odd",
    [
        {"intermediate_size": [128, 128]},
        {"intermediate_size": "x"},
        {"intermediate_size": -1},
        {"hidden_size": 10**400},
        {"num_hidden_layers": 1.5},
        {"more": "x" * (17 << 20)},
    ],
)
def test_an_odd_config_json_is_no_reason_for_a_warning_and_none_to_end(
    tmp_path: Path, odd: dict[str, Any]
) -> None:
    config = compose(["model=smollm2_135m"])
    data = msgspec.structs.replace(prepared(64), model_folder=str(tmp_path))
    for sizes, is_known in (({}, True), (odd, False)):
        model = {"num_hidden_layers": 2, "hidden_size": 64} | sizes
        (tmp_path / "config.json").write_text(json.dumps(model))
        assert (preflight._generous_bytes(config, data) > 0) == is_known


def test_an_estimate_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("not a size")

    monkeypatch.setattr(dry_run, "estimate", fail)
    assert "unknown (TypeError: not a size)" in (warning(monkeypatch, 1.0) or "")


HOSTS = "{name: a, memory_gb: 0.002}, {name: b, memory_gb: 0.002}"


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["cluster.ranks=4"], "too few for 4 ranks.* at most 3 ranks"),
        (["algorithm.layers=[[0,0],[2,2]]"], "every layer belongs to one rank"),
        (["algorithm.layers=[[0,1],[1,2]]"], "every layer belongs to one rank"),
        (["algorithm.micro_batches=33"], "allowed: auto or 1 to 32"),
        (["model=mlp", "data=digits"], "model=gpt_tiny or another decoder, or algorithm=fsdp"),
        (
            ["cluster.ranks=auto", f"cluster.hosts=[{HOSTS}]"],
            r"no cut fits .*memory_gb \(0.0 GB, 0.0 GB\); add hosts",
        ),
        (
            ["model=hf", "model.name={folder}", "model.pretrained=false"],
            "family gpt_neox cannot be cut .* llama.* can, or take algorithm=fsdp",
        ),
        (
            ["model=hf", "model.name={folder}", "model.pretrained=false", "training.dry_run=true"],
            "family gpt_neox cannot be cut .* llama.* can, or take algorithm=fsdp",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_so_ends_the_command(
    keys: list[str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "words.txt").write_text("some words of a text\n" * 999)
    (tmp_path / "model").mkdir()
    small = {"model_type": "gpt_neox", "vocab_size": 300, "hidden_size": 32}
    small |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps(small))
    monkeypatch.chdir(tmp_path)
    data = ["data=text", f"data.path={tmp_path}/words.txt", "data.tokenizer=bytes"]
    typed = ["algorithm=mp_pipeline", "cluster.ranks=2", *data, *keys]
    typed = [key.format(folder=tmp_path / "model") if "{folder}" in key else key for key in typed]
    monkeypatch.setattr(sys, "argv", ["smolrun", *typed])
    assert cli.main() == 2
    said = capfd.readouterr().err
    assert "nothing was started" in said
    assert re.search(why, said)
    assert not (tmp_path / "outputs").exists()


def test_a_run_says_who_has_which_layers() -> None:
    prepared = spec_of(compose(["data.tokenizer=bytes"]))
    cut = ["algorithm=mp", "cluster.ranks=2", "data.tokenizer=bytes"]
    assert stages_note(compose(cut), prepared) == "rank 0 layers 0 to 1, rank 1 layer 2"
    assert stages_note(compose(["algorithm=fsdp"]), prepared) is None
