"""model=hf: transformers' own numbers, equal on every rank, from a folder and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

from smolrun.errors import ConfigError
from smolrun.models.huggingface import build, prepare
from smolrun.models.huggingface_network import HuggingFaceNetwork
from smolrun.models.initialise import build_model
from tests.models.model_folders import FAMILIES, change_config, save_model
from tests.models.tiny import Spec

KEYS: dict[str, Any] = {"pretrained": True, "revision": None, "attention": "auto", "dropout": 0.0}
TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


def make(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **keys: Any
) -> HuggingFaceNetwork:
    model = build_model(
        lambda: build(Spec(model_folder=str(folder)), **{**KEYS, **keys}),
        seed,
        dtype=dtype,
        device="cpu",
    )
    assert isinstance(model, HuggingFaceNetwork)
    return model


def theirs(folder: Path, **keys: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **keys)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a worker opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("no_network")
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path, family)
    with torch.no_grad():
        expected = theirs(folder)(TOKENS).logits
        assert expected.abs().max() > 0.5
        assert torch.equal(make(folder)(TOKENS), expected)
        eager = make(folder, attention="eager")
        assert eager.network.config._attn_implementation == "eager"
        assert (eager(TOKENS) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_positions_exact(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path, family)
    expected = theirs(folder, dtype=torch.bfloat16)(TOKENS).logits
    model = make(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(TOKENS), expected)


def test_weights_kept_in_half_precision_are_widened_exactly(tmp_path: Path) -> None:
    folder = save_model(tmp_path, dtype=torch.bfloat16)
    expected = theirs(folder, dtype=torch.float32)(TOKENS).logits
    assert torch.equal(make(folder)(TOKENS), expected)


def test_random_weights_come_from_the_seed(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    models = [make(folder, seed, pretrained=False).state_dict() for seed in (3, 3, 4)]
    name = "network.model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not torch.equal(models[0][name], models[2][name])
    assert not torch.equal(models[0][name], make(folder).state_dict()[name])


def test_a_shape_alone_needs_no_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (folder / "model.safetensors").unlink()
    found = prepare(tmp_path, lambda *_: None, str(folder), **{**KEYS, "pretrained": False})
    assert found.tokenizer_folder is None
    assert make(folder, pretrained=False)(TOKENS).shape == (2, 40, 61)
    with torch.device("meta"):
        model = build(Spec(model_folder=str(folder)), **{**KEYS, "pretrained": False})
    assert all(parameter.is_meta for parameter in model.parameters())


def test_shared_weights_are_one_parameter_in_every_precision(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = make(folder, dtype=dtype)
        names = [name for name, _ in model.named_parameters()]
        assert names == [name for name, _ in make(folder).named_parameters()]
        assert not any("lm_head" in name for name in names)
        assert model.network.lm_head.weight is model.network.model.embed_tokens.weight


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_blocks_changes_no_gradient(tmp_path: Path, family: str) -> None:
    model = make(save_model(tmp_path, family))
    runs = []
    block = next(m for m in model.modules() if type(m).__name__.endswith("MLP"))
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients(model)
    assert len(runs) == 1
    model.recompute = True
    assert model.recompute
    runs.clear()
    again = gradients(model)
    assert len(runs) == 2  # once forward, once more for backward
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    model.recompute = False
    assert not model.recompute


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gpt2")  # whose own rate is 0.1
    model = make(folder)
    assert model.training
    assert torch.equal(model(TOKENS), model(TOKENS))
    lively = make(folder, dropout=0.3)
    assert not torch.equal(lively(TOKENS), lively(TOKENS))
    lively.eval()
    assert torch.equal(lively(TOKENS), model(TOKENS))


def test_a_padded_vocabulary_is_fine_and_a_small_one_is_not(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    spec = Spec(num_outputs=50, model_folder=str(folder))
    assert build(spec, **KEYS)(TOKENS % 50).shape[-1] == 61
    with pytest.raises(ConfigError, match=r"tokenizer has 62 tokens.*knows 61"):
        build(Spec(num_outputs=62, model_folder=str(folder)), **KEYS)


def test_sequences_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        folder = save_model(tmp_path / family, family)
        with pytest.raises(ConfigError, match=r"sequence_length=65 is more than .*64 tokens"):
            build(Spec(sequence_length=65, model_folder=str(folder)), **KEYS)


def test_features_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    with pytest.raises(ConfigError, match="reads tokens"):
        build(Spec(sequence_length=None, num_inputs=4, model_folder=str(folder)), **KEYS)


def lacking(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)


def of_another_width(folder: Path) -> None:
    change_config(folder, intermediate_size=48)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lacking, r"lack model\.layers\.2\."), (of_another_width, "cannot build|another shape")],
)
def test_weights_that_are_not_the_models_are_refused(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = save_model(tmp_path)
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        make(folder)
