"""`smolrun.load`: the weights of a checkpoint in the model that they were trained in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import platformdirs
import pytest
import torch
from torch import nn

import smolrun
from smolrun.checkpoints.folder import commit, part_folder
from smolrun.checkpoints.manifest import merge
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.checkpoints.writer import write_shard
from smolrun.cli.compose import compose
from smolrun.config import resolved
from smolrun.data.tokenizer import train_bpe
from smolrun.errors import CheckpointError, ConfigError, SmolrunError
from smolrun.parts.replicas import persistent_buffers
from smolrun.tracking.run_folder import RunFolder
from tests.models.model_folders import save_model
from tests.models.tiny import TINY, enliven, make_tiny_decoder

FEATURES = {"num_outputs": 3, "num_inputs": 2, "sequence_length": None}
TOKENS = {"num_outputs": 61, "num_inputs": None, "sequence_length": 48}
OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, spec, width):
        super().__init__()
        self.first = nn.Linear(spec.num_inputs, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, spec.num_outputs)
        self.twice = self.last  # the same parameters by two names

    def forward(self, inputs):
        return self.last(self.norm(self.first(inputs)))


def build(spec, *, width):
    return Net(spec, width)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with code of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    Path("code_to_load.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("code_to_load", None)


def make_run(
    model: nn.Module, sizes: Any, overrides: list[str], average: float | None = None
) -> RunFolder:
    folder = RunFolder(Path("outputs") / "a-run")
    folder.path.mkdir(parents=True)
    tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
    slices = [TensorSlice.whole(f"model/{name}", value) for name, value in tensors.items()]
    if average is not None:
        name, value = next(model.named_parameters())
        slices.append(TensorSlice.whole(f"average/{name}", torch.full_like(value, average)))
    part = part_folder(folder.checkpoints, 7, "t")
    report = write_shard(part, 0, slices)
    state = {} if sizes is None else {"data": {"sha256": "0", **sizes}}
    commit(part, merge([report], step=7, run_id="r", config_hash="c", world_size=1, state=state))
    folder.write_config(msgspec.yaml.encode(resolved(compose(overrides))).decode())
    return folder


def own_model() -> nn.Module:
    from code_to_load import build  # type: ignore[import-not-found]  # of the fixture

    model: nn.Module = build(SimpleNamespace(**FEATURES), width=5)
    for tensor in model.buffers():
        tensor.add_(3)  # running statistics and their counter
    return model


OVERRIDES = ["model.target=code_to_load:build", "model.width=5", "data=digits"]


def test_a_model_of_own_code_has_its_weights_and_buffers(here: Path) -> None:
    wanted = own_model()
    make_run(wanted, FEATURES, OVERRIDES)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    model, tokenizer = smolrun.load("a-run")
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.training, tokenizer) == (False, None)
    inputs = torch.randn(4, 2)
    assert torch.equal(model(inputs), wanted.eval()(inputs))
    assert model.norm.num_batches_tracked == 3


def test_averaged_weights_are_those_that_were_evaluated(here: Path) -> None:
    make_run(own_model(), FEATURES, OVERRIDES, average=0.25)
    model, _ = smolrun.load("a-run")
    assert torch.equal(model.first.weight, torch.full((5, 2), 0.25))


def test_our_decoder_comes_with_its_tokenizer_and_type(here: Path) -> None:
    wanted = enliven(make_tiny_decoder()).bfloat16()
    keys = [f"model.{key}={'null' if value is None else value}" for key, value in TINY.items()]
    run = make_run(wanted, TOKENS, [*keys, "data.sequence_length=40", "precision=bf16_params"])
    (run.path / "tokenizer").mkdir()
    train_bpe(["a b c " * 99], 260).save(run.path / "tokenizer")
    model, tokenizer = smolrun.load(run.path)
    ids = torch.randint(0, 61, (2, 40))
    assert torch.equal(model(ids), wanted.eval()(ids))
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("a c")) == "a c"


def test_a_model_of_transformers_needs_no_weights_of_its_origin(here: Path) -> None:
    from smolrun.models.huggingface_network import load

    source = save_model(here / "mine", vocab_size=61)
    wanted = load(source, pretrained=True, attention="auto", dropout=0.0)
    run = make_run(wanted, TOKENS, ["model=hf", "model.name=mine"])
    run.keep_model_config(source)
    (source / "model.safetensors").unlink()
    model, _ = smolrun.load("a-run")
    ids = torch.randint(0, 61, (2, 16))
    assert torch.equal(model(ids), wanted.eval()(ids))


def test_code_that_a_folder_of_others_names_is_not_imported_unasked(
    here: Path,
) -> None:
    (here / "code_of_others.py").write_text(
        "from torch import nn\nopen('ran', 'w')\nbuild = lambda spec: nn.Linear(2, 3)\n"
    )
    run = make_run(nn.Linear(2, 3), FEATURES, ["model.target=code_of_others:build"])
    run.config.write_text(run.config.read_text() + "# of another\n")
    with pytest.raises(ConfigError, match=r"runs code_of_others:build.*trust_run_folder=True"):
        smolrun.load("a-run")
    assert not (here / "ran").exists()
    smolrun.load("a-run", trust_run_folder=True)
    assert (here / "ran").exists()
    sys.modules.pop("code_of_others")


@pytest.mark.parametrize(
    ("sizes", "overrides", "error", "what"),
    [
        (None, OVERRIDES, CheckpointError, "an older version of smolrun"),
        ({**FEATURES, "num_inputs": "2"}, OVERRIDES, CheckpointError, "state is damaged"),
        (
            FEATURES,
            ["model.target=code_to_load:build", "model.width=6", "data=digits"],
            CheckpointError,
            "of another model: model/first.weight",
        ),
        (FEATURES, ["model.target=no_such_code:build"], ConfigError, "start it in that folder"),
    ],
)
def test_what_cannot_be_loaded_is_told(
    here: Path, sizes: Any, overrides: list[str], error: type[SmolrunError], what: str
) -> None:
    Path("no_such_code.py").touch()
    make_run(own_model(), sizes, overrides)
    Path("no_such_code.py").unlink()
    with pytest.raises(error, match=what):
        smolrun.load("a-run")


def test_another_attribute_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = smolrun.lod
