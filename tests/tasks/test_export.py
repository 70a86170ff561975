"""task=export: a run's model as transformers loads it, and everything it refuses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import transformers

from smolrun.checkpoints.reader import CheckpointReader
from smolrun.cli.compose import compose
from smolrun.cli.run import drive
from smolrun.config import resolved
from smolrun.data.tokenizer import load_tokenizer, train_bpe
from smolrun.models.export import write_tokenizer
from smolrun.models.mlp import build as build_mlp
from tests.models.model_folders import save_model
from tests.models.test_export import save
from tests.models.tiny import TINY, enliven, make_tiny_decoder
from tests.tasks.test_whole_runs import finish, start

SIZES = {"num_outputs": 3, "num_inputs": 2, "sequence_length": None}
TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
KEYS = [f"model.{key}={json.dumps(value)}" for key, value in TINY.items()]
KEYS += ["data.sequence_length=40"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that trained a tiny decoder; the current folder is the one above."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "a-run"
    (folder / "checkpoints").mkdir(parents=True)
    save(folder / "checkpoints", enliven(make_tiny_decoder()))
    write_config(folder, *KEYS)
    (folder / "tokenizer").mkdir()
    train_bpe(["a b c " * 99], 260).save(folder / "tokenizer")
    os.symlink("a-run", tmp_path / "outputs" / "latest")
    return folder


def write_config(folder: Path, *overrides: str) -> None:
    plain = resolved(compose(overrides))
    (folder / "config.yaml").write_bytes(msgspec.yaml.encode(plain))


def export(*overrides: str) -> int:
    return drive(compose(["task=export", *overrides]))


def test_a_run_of_our_decoder_is_exported_whole(run: Path, capsys: Any) -> None:
    assert export() == 0
    out = run / "huggingface-step-00000007"
    shown = capsys.readouterr().out
    assert 'from_pretrained("outputs/a-run/huggingface-step-00000007")' in shown
    assert str(run) not in shown, "a path below the working directory is relative"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        difference = model(TOKENS).logits - enliven(make_tiny_decoder())(TOKENS)
    assert difference.abs().max() < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("a c")["input_ids"] == load_tokenizer(run / "tokenizer").encode("a c")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    card = (out / "README.md").read_text()
    assert "- steps: 7 of " in card
    assert "library_name: transformers" in card
    assert not list(run.glob(".huggingface*"))


def test_another_folder_and_type_may_be_asked_for(run: Path) -> None:
    (run.parent.parent / "empty").mkdir()
    checkpoint = run / "checkpoints" / "step-00000007"
    assert export(f"model.run={checkpoint}", "export.out=empty", "export.dtype=bf16") == 0
    config = json.loads(Path("empty/config.json").read_text())
    assert (config["dtype"], config["model_type"]) == ("bfloat16", "llama")


def used(run: Path) -> None:
    (run / "huggingface-step-00000007").mkdir()
    (run / "huggingface-step-00000007" / "mine.txt").touch()


def damaged(run: Path) -> None:
    (next((run / "checkpoints").glob("*/*.safetensors"))).write_bytes(b"")


def no_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def unreadable_config(run: Path) -> None:
    (run / "config.yaml").write_text("model: [")


def of_own_code_without_sizes(run: Path) -> None:
    write_config(run, "model.target=torch.nn:Linear")


def of_what_is_no_code(run: Path) -> None:
    save(run / "checkpoints", torch.nn.Linear(2, 3), {"data": SIZES})
    plain = resolved(compose(["model.target=torch.nn:Linear"]))
    plain["model"]["x=1); print("] = 2
    (run / "config.yaml").write_bytes(msgspec.yaml.encode(plain))


def of_another_shape(run: Path) -> None:
    write_config(run, *KEYS, "model.layers=5")


def of_no_class(run: Path) -> None:
    write_config(run, *KEYS, "model.norm=layernorm")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (used, "there is something already, and export overwrites nothing"),
        (damaged, "has no checkpoint that can be used"),
        (no_config, "config.yaml cannot be read"),
        (unreadable_config, "config.yaml cannot be read"),
        (of_own_code_without_sizes, "was saved by an older version of smolrun"),
        (of_what_is_no_code, "model.target = torch.nn:Linear names no code"),
        (of_another_shape, "LlamaForCausalLM does not fit the checkpoint: model.layers.4."),
        (of_no_class, "LlamaForCausalLM, which cannot have norm=layernorm"),
    ],
)
def test_what_cannot_be_exported_is_told_and_nothing_is_left(
    run: Path, capsys: Any, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(run)
    before = sorted(path.name for path in run.iterdir())
    assert export() == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_model_without_a_class_is_one_file_and_the_lines_that_load_it(run: Path) -> None:
    model = build_mlp(SimpleNamespace(**SIZES), widths=[4], activation="gelu")
    save(run / "checkpoints", model, {"data": SIZES})
    widths = ["model.widths=[4]", "model.activation=gelu"]
    plain = resolved(compose(["model=mlp", "data=digits", *widths]))
    plain["model"]["loss"] = "a_module_elsewhere:loss"  # neither exported nor loaded
    (run / "config.yaml").write_bytes(msgspec.yaml.encode(plain))
    assert export("export.dtype=bf16") == 0
    out = run / "safetensors-step-00000007"
    names = {path.name for path in out.iterdir()}
    assert names == {"model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}
    card = (out / "README.md").read_text()
    (lines,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(lines.replace("model.safetensors", str(out / "model.safetensors")), found)
    for name, value in found["model"].named_parameters():
        assert torch.equal(value, model.get_parameter(name).bfloat16().float()), name


def test_a_run_that_is_not_there_is_told(run: Path, capsys: Any) -> None:
    assert export("model.run=another") == 2
    assert "model.run = another: there is no run and no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["serve", "generate", "chat"])
def test_a_run_without_its_tokenizer_is_not_talked_to(run: Path, capsys: Any, task: str) -> None:
    (run / "tokenizer" / "tokenizer.json").unlink()
    words = [] if task == "serve" else ["generate.prompt=Hi"]
    assert drive(compose([f"task={task}", "model.run=latest", *words])) == 2
    said = capsys.readouterr().err
    place = Path("outputs", "a-run", "tokenizer", "tokenizer.json")
    assert f"model.run = latest: there is no {place}, so prompts cannot be read" in said
    assert "copy that folder from the run as it was trained" in said
    assert 'smolrun.load("outputs/a-run")' in said
    assert [path.name for path in run.parent.iterdir() if path.name != "latest"] == ["a-run"]


@pytest.mark.soak
def test_a_model_of_transformers_trains_on_two_ranks_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = save_model(tmp_path / "mine", vocab_size=320)
    text = "".join(f"the number {number} comes after {number - 1}\n" for number in range(3000))
    (tmp_path / "text.txt").write_text(text)
    ours = train_bpe([text], 300)
    ours.save(source)
    write_tokenizer(source, source)
    choices = ["model=hf", "model.name=mine", "data=text", "data.path=text.txt"]
    choices += ["data.sequence_length=32", "training.steps=6", "training.recompute=true"]
    choices += ["training.check_replicas=true", "checkpoint.every=6", "optimizer.lr=0.01"]
    code, _, err = finish(start(tmp_path, *choices, "training.sample_tokens=4"))
    assert code == 0, err
    assert export("export.out=out") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    (checkpoint,) = Path("outputs/latest/checkpoints").iterdir()
    with CheckpointReader(checkpoint) as saved:
        for name, value in model.named_parameters():
            assert torch.equal(value, saved.read(f"model/network.{name}")), name
    before = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer(text[:200])["input_ids"] == ours.encode(text[:200])
