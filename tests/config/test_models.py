"""Rules about the choice of a model."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.config.models import HuggingFaceConfig, SmolLM2Config, TrainedConfig
from smolrun.errors import ConfigError

ROPE = "{factor: 8.0, low_freq_factor: %s, high_freq_factor: 4.0, %s: 8192}"
ORIGINAL = "original_max_position_embeddings"


def test_the_models_of_others_are_chosen_by_name() -> None:
    model = compose(["model=hf", "model.name=owner/model"]).model
    assert isinstance(model, HuggingFaceConfig)
    assert model.keywords().keys() == {"pretrained", "revision", "attention", "dropout"}
    assert isinstance(compose(["model=smollm2_135m"]).model, SmolLM2Config)


def test_exporting_brings_the_model_of_a_run_along() -> None:
    config = compose(["task=export", "model.run=a-run"])
    assert isinstance(config.model, TrainedConfig)
    assert config.model.run == "a-run"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=hf"], "model.name: set model.name=NAME of the hub, or a FOLDER"),
        (["model.name=owner/model"], "allowed: model=hf model.name=owner/model"),
        (["task=chat", "driver=mini"], "driver = mini: task=chat is driven by this machine"),
        (["task=serve", "model=gpt_tiny"], "model = gpt_tiny: is built anew"),
        (["model=trained", "task=bench"], "model = trained: is not for task=bench"),
        (["task=export", "model=gpt_tiny"], "task=export takes its model from a run"),
        (["model=hf", "model.name=a", "model.dropout=1.0"], "model.dropout = 1.0: too large"),
        (["model=hf", "model.name=a", "data=digits", "model.attention=best"], "model.attention"),
        (["model=hf", "model.name=a", "data=digits"], "reads tokens, but data=digits gives"),
        ([f"model.rope_scaling={ROPE % ('5.0', ORIGINAL)}"], "must be above low_freq_factor"),
        ([f"model.rope_scaling={ROPE % ('1.0', 'length')}"], ORIGINAL),
        (["task=export", "export.dtype=int8"], "export.dtype = int8: no such choice"),
    ],
)
def test_mistakes_are_told(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert any(message in line for line in error.value.problems), error.value.problems
