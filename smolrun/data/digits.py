"""Synthetic digits: images of 0..9 with random slant, size, shift and noise.

A stand-in for handwritten digits that needs no download.
Shape suffixes: N images, P pixels of one image.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, cached
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.errors import DataError

SIDE = 28  # pixels, as in MNIST, so that models made for it fit
# One row a line, one digit a column of five characters.
_FONT = """
 ###    #    ###   ###     #  #####  ##   #####  ###   ###
#   #  ##   #   # #   #   ##  #     #         # #   # #   #
#  ##   #       #     #  # #  #     #         # #   # #   #
# # #   #      #    ##  #  #  ####  ####     #   ###   ####
##  #   #     #       # #####     # #   #   #   #   #     #
#   #   #    #    #   #    #  #   # #   #  #    #   #    #
 ###   ###  #####  ###     #   ###   ###   #     ###   ##
"""
_CHUNK = 1000  # images drawn at once: about 40 MB of coordinates


@dataclass
class Digits:
    """Ten classes of 28 x 28 images; the keys are explained in conf/data/digits.yaml."""

    produces: ClassVar[Kind] = "features"

    cache_dir: Path
    _: KW_ONLY
    train_size: int
    eval_size: int
    noise: float
    seed: int

    def prepare(self, progress: Progress) -> Prepared:
        """Draw the images, or take them from the cache; raises DataError for bad settings."""
        lowest = {"train_size": 1, "eval_size": 1, "noise": 0, "seed": 0}
        key = {name: getattr(self, name) for name in lowest}
        for name, limit in lowest.items():
            if key[name] < limit:
                raise DataError(f"data.{name}={key[name]}: must be at least {limit}")
        entry = cached(self.cache_dir, "digits", key, lambda folder: self._write(folder, progress))
        return Prepared(
            kind="features",
            path=str(entry.data_path),
            sha256=entry.sha256,
            num_outputs=10,
            num_inputs=SIDE * SIDE,
            sequence_length=None,
            tokenizer=None,
            train_size=self.train_size,
            eval_size=self.eval_size,
            description=f"digits: {self.train_size:,} train and {self.eval_size:,} eval images",
        )

    def _write(self, folder: Path, progress: Progress) -> dict[str, Any]:
        total = self.train_size + self.eval_size
        # Train and eval are one array of images cut in two, so no image is in both.
        random = numpy.random.default_rng(self.seed)
        targets_N = random.integers(0, 10, total)
        pictures = []
        for start in range(0, total, _CHUNK):
            progress("drawing digits", start, total)
            pictures.append(draw(targets_N[start : start + _CHUNK], self.noise, random))
        progress("drawing digits", total, total)
        inputs_NP = numpy.concatenate(pictures)
        border = self.train_size
        tensors = {
            "train_inputs": inputs_NP[:border],
            "train_targets": targets_N[:border],
            "eval_inputs": inputs_NP[border:],
            "eval_targets": targets_N[border:],
        }
        save_file(tensors, folder / DATA_FILE)
        return {}


def draw(digits_N: numpy.ndarray, noise: float, random: numpy.random.Generator) -> numpy.ndarray:
    """Images [N, P] uint8: each pixel is a bilinear sample of the font."""
    glyphs = _glyphs()
    middle_row, middle_column = (glyphs.shape[1] - 1) / 2, (glyphs.shape[2] - 1) / 2
    count = len(digits_N)
    scale_N = random.uniform(2.0, 3.0, count)  # pixels per font dot
    slant_N = random.uniform(-0.35, 0.35, count)
    shift_N2 = random.uniform(-2.5, 2.5, (count, 2))
    grid_P2 = numpy.indices((SIDE, SIDE)).reshape(2, -1).T - (SIDE - 1) / 2
    places_NP2 = (grid_P2 - shift_N2[:, None]) / scale_N[:, None, None]
    row_NP = places_NP2[..., 0] + middle_row
    column_NP = places_NP2[..., 1] + middle_column + slant_N[:, None] * places_NP2[..., 0]
    ink_NP = _blend(glyphs, digits_N[:, None], row_NP, column_NP)
    ink_NP *= random.uniform(0.6, 1.0, (count, 1))
    ink_NP += noise * random.standard_normal(ink_NP.shape)
    return numpy.asarray((ink_NP.clip(0, 1) * 255).astype(numpy.uint8))


def _glyphs() -> numpy.ndarray:
    """The font as [10, rows, columns] of 0 and 1, with an empty border so that edges fade out."""
    rows = [line.ljust(60) for line in _FONT.strip("\n").splitlines()]
    dots = numpy.array([[dot == "#" for dot in row] for row in rows], dtype=numpy.float64)
    glyphs = dots.reshape(len(rows), 10, 6).transpose(1, 0, 2)[:, :, :5]
    return numpy.pad(glyphs, ((0, 0), (1, 1), (1, 1)))


def _blend(
    glyphs: numpy.ndarray, digit: numpy.ndarray, row: numpy.ndarray, column: numpy.ndarray
) -> numpy.ndarray:
    """Bilinear look-up of glyphs[digit] at fractional places; outside is the empty border."""
    last_row, last_column = glyphs.shape[1] - 2, glyphs.shape[2] - 2
    row, column = row.clip(0, last_row + 1), column.clip(0, last_column + 1)
    top = numpy.minimum(row.astype(int), last_row)
    left = numpy.minimum(column.astype(int), last_column)
    down, right = row - top, column - left
    upper = glyphs[digit, top, left] * (1 - right) + glyphs[digit, top, left + 1] * right
    lower = glyphs[digit, top + 1, left] * (1 - right) + glyphs[digit, top + 1, left + 1] * right
    return numpy.asarray(upper * (1 - down) + lower * down)
