"""Drawn digits: the same for a seed, no picture twice, readable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from smolrun.data.digits import Digits, draw
from smolrun.data.splits import Prepared, open_split
from smolrun.errors import DataError


def prepare(folder: Path, **keys: Any) -> Prepared:
    settings = {"train_size": 300, "eval_size": 100, "noise": 0.0, "seed": 0, **keys}
    return Digits(folder, **settings).prepare(lambda what, done, total: None)


def test_batches_are_pictures_and_classes(tmp_path: Path) -> None:
    prepared = prepare(tmp_path)
    assert (prepared.kind, prepared.num_inputs, prepared.num_outputs) == ("features", 784, 10)
    assert (prepared.train_size, prepared.eval_size) == (300, 100)
    batch = open_split(prepared, "train", verify=True).batch([5, 2, 299])
    assert batch.inputs.shape == (3, 784)
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.dtype == torch.int64
    assert 0 <= batch.inputs.min() < batch.inputs.max() <= 1
    assert open_split(prepared, "eval", verify=True).batch([]).inputs.shape == (0, 784)


def test_train_and_eval_share_no_picture_even_without_noise(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, train_size=2000, eval_size=500)
    train, held_out = (open_split(prepared, name, verify=True) for name in ("train", "eval"))
    pictures = torch.cat([train.batch(range(2000)).inputs, held_out.batch(range(500)).inputs])
    assert len({picture.numpy().tobytes() for picture in pictures}) == 2500
    assert set(held_out.batch(range(500)).targets.tolist()) == set(range(10))


def test_a_seed_gives_the_same_pictures(tmp_path: Path) -> None:
    first, again = prepare(tmp_path / "a"), prepare(tmp_path / "b")
    assert first.sha256 == again.sha256
    assert first.sha256 != prepare(tmp_path / "a", seed=1).sha256
    assert first.sha256 != prepare(tmp_path / "a", noise=0.5).sha256


def test_pictures_hold_the_whole_digit() -> None:
    pictures = draw(numpy.repeat(numpy.arange(10), 200), 0.0, numpy.random.default_rng(0)).reshape(
        -1, 28, 28
    )
    border = numpy.ones((28, 28), bool)
    border[1:-1, 1:-1] = False
    ink = pictures.astype(float).sum((1, 2))
    assert (ink > 20 * 255).all()  # the thinnest digit in its smallest size
    assert pictures[:, border].astype(float).sum() < 0.01 * ink.sum()


@pytest.mark.parametrize(
    "keys", [{"train_size": 0}, {"eval_size": 0}, {"noise": -0.1}, {"seed": -1}]
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"data.{next(iter(keys))}="):
        prepare(tmp_path, **keys)
