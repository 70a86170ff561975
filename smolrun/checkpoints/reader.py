"""Reading a checkpoint: any range of any tensor, independent of how it was sharded.

Files are memory-mapped, so only the requested ranges are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from smolrun.checkpoints.find import check_files, read_manifest
from smolrun.checkpoints.manifest import TensorEntry
from smolrun.checkpoints.tensor_slice import DTYPE_OF_NAME, TensorSlice
from smolrun.errors import CheckpointError


class CheckpointReader:
    """An open checkpoint. Sizes and headers are checked here; `newest_valid`, `locate` and `verify`
    check the hashes.

    Close it, or use it in a `with`, before its folder is moved: Windows does not move open files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        check_files(folder, self.manifest, hashes=False)
        self._files: dict[str, Any] = {}

    def keys(self, prefix: str = "") -> list[str]:
        """The keys of all tensors that start with `prefix`, sorted."""
        return sorted(key for key in self.manifest.tensors if key.startswith(prefix))

    def shape(self, key: str) -> tuple[int, ...]:
        """The global shape."""
        return tuple(self._entry(key).shape)

    def dtype(self, key: str) -> torch.dtype:
        return DTYPE_OF_NAME[self._entry(key).dtype]

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """The whole tensor, or elements [start, stop) of it, flat; a new tensor on the CPU."""
        entry = self._entry(key)
        first = 0 if start is None else start
        last = entry.num_elements if stop is None else stop
        if not 0 <= first <= last <= entry.num_elements:
            raise CheckpointError(
                f"{key} has {entry.num_elements:,} elements, not the range {first:,} to {last:,}"
            )
        flat = torch.empty(last - first, dtype=DTYPE_OF_NAME[entry.dtype])
        for piece in entry.pieces:
            low, high = max(first, piece.start), min(last, piece.stop)
            if low < high:
                values = self._values(piece.file, piece.name, low - piece.start, high - piece.start)
                flat[low - first : high - first].copy_(values)
        return flat.view(entry.shape) if start is None and stop is None else flat

    def dtypes(self, prefix: str) -> dict[str, torch.dtype]:
        """Of all tensors whose key starts with `prefix`, by the rest of the key."""
        return {key.removeprefix(prefix): self.dtype(key) for key in self.keys(prefix)}

    def load(
        self, slices: Iterable[TensorSlice], all_of: str | None = None, *, casts: bool = False
    ) -> None:
        """Fills the memory of `slices`; CheckpointError where a key is missing, or of another shape
        or, unless it `casts`, dtype. With `all_of`, also where the checkpoint has a key with this
        prefix that none of them has."""
        known = set()
        for part in slices:
            known.add(part.key)
            if part.key not in self.manifest.tensors:
                raise CheckpointError(f"{self.folder} is of another model: it has no {part.key}")
            shape, dtype = self.shape(part.key), self.dtype(part.key)
            if shape != part.shape or (dtype != part.values.dtype and not casts):
                raise CheckpointError(
                    f"{self.folder} is of another model: {part.key} is {shape} of {dtype}, not "
                    f"{part.shape} of {part.values.dtype}"
                )
            values = self.read(part.key, part.start, part.stop)
            part.values.copy_(values.view_as(part.values))
        if all_of and (unknown := [key for key in self.keys(all_of) if key not in known]):
            raise CheckpointError(f"{self.folder} is of another model: it has {unknown[0]}")

    def load_weights(self, slices: Iterable[TensorSlice]) -> None:
        """Fills slices `model/NAME`, from averaged weights where the checkpoint has them, as
        evaluation and export do; in any dtype. CheckpointError where it is of another model."""
        slices = list(slices)
        self.load(slices, all_of="model/", casts=True)
        averages = [replace(one, key=f"average/{one.key[len('model/') :]}") for one in slices]
        self.load((one for one in averages if one.key in self.manifest.tensors), casts=True)

    def _values(self, file: str, name: str, start: int, stop: int) -> torch.Tensor:
        path = self.folder / file
        try:
            if file not in self._files:
                self._files[file] = safe_open(path, framework="pt")
            values: torch.Tensor = self._files[file].get_slice(name)[start:stop]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        return values

    def _entry(self, key: str) -> TensorEntry:
        entry = self.manifest.tensors.get(key)
        if entry is None:
            raise CheckpointError(
                f"the checkpoint {self.folder} has no {key!r}; it holds "
                f"{len(self.manifest.tensors)} other tensors"
            )
        return entry

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.clear()  # a file is closed with its last reference

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
