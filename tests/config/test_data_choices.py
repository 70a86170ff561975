"""What a data set brings along, what the command line still decides, and what its keys refuse."""

from __future__ import annotations

import pytest

from smolrun.cli.compose import compose
from smolrun.errors import ConfigError


def test_pictures_bring_their_training_along_and_the_command_line_wins() -> None:
    config = compose(["model=mlp", "data=fashion_mnist"])
    assert (config.data.name, config.training.global_batch_size) == ("fashion_mnist", 256)
    assert config.training.eval_batches is None
    for choices, batch in ((["training=default"], 32), (["training.global_batch_size=8"], 8)):
        config = compose(["model=mlp", "data=fashion_mnist", *choices])
        assert config.training.global_batch_size == batch
    assert compose(["model=mlp"]).data.name == "digits"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["data=fashion_mnist"], "reads tokens, but data=fashion_mnist gives features"),
        (["model=mlp", "data=shakespeare"], "reads features, but data=shakespeare gives tokens"),
        (["data=hf"], "data.path: set data.path=NAME, FOLDER or FILE"),
        (["data=chat"], "data.path: set data.path=FILE.jsonl"),
        (["data=hf", "data.path=x", "data.image_mode=blue"], "allowed: grey or rgb"),
        (["data=hf", "data.path=x", "data.image_size=0"], "data.image_size = 0: too small"),
        (["data=hf", "data.path=x", "data.column=y"], "data.column = y: no such key"),
        (["data=chat", "data.path=x", "data.tokenizer=''"], 'data.tokenizer = "": empty'),
        (["data=chat", "data.path=x", "data.sequence_length=512"], "reads at most 256"),
        (["model=mlp", "data=mnist", "data.eval_fraction=1.0"], "data.eval_fraction = 1.0: too"),
    ],
)
def test_what_a_data_set_refuses(choices: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        compose(choices)
    assert message in str(refusal.value)
