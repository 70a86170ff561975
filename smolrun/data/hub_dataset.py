"""The library `datasets`: opening a dataset, choosing its columns, reading it as a stream.

No code of a dataset runs: `datasets` reads data files only since its version 4.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smolrun.data.prepared import Progress
from smolrun.errors import DataError
from smolrun.files import read_json

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
# How long to wait for the hub's first answer before we look at what was fetched earlier.
_HUB_TIMEOUT_S = 20.0


def open_dataset(
    path: str,
    subset: str | None,
    split: str,
    *,
    cache_dir: Path,
    progress: Progress,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """One split of the dataset at `path`: a hub name, a folder, a file, or a save_to_disk folder.

    Downloads go to Hugging Face's own cache, tables made of them to `cache_dir`. Raises DataError
    that names what there is instead.
    """
    import datasets

    datasets.disable_progress_bars()  # the console shows ours
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    what = f"opening the dataset {path}"
    progress(what, 0, 1)
    place = Path(os.path.expanduser(path))
    is_saved = (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()
    try:
        if is_saved:
            opened: Any = _open_saved(place, split, path)
            opened = opened.to_iterable_dataset() if streaming else opened
        else:
            where: dict[str, Any] = {"path": str(place) if place.exists() else path}
            if place.is_file():
                if place.suffix not in _BUILDERS:
                    raise DataError(
                        f"data.path={path}: files may end with {', '.join(_BUILDERS)} only"
                    )
                where = {"path": _BUILDERS[place.suffix], "data_files": str(place)}
            with _quick_to_fail(path, is_local=place.exists()):
                opened = datasets.load_dataset(
                    **where,
                    name=subset,
                    split=split,
                    streaming=streaming,
                    cache_dir=str(cache_dir / "datasets"),
                )
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, its own and those of others
        raise DataError(_sentence(path, subset, split, error)) from error
    progress(what, 1, 1)
    return opened


def _open_saved(place: Path, split: str, path: str) -> Any:
    from datasets import Dataset

    there = ["train"]
    if (place / "dataset_dict.json").is_file():
        try:
            there = read_json(place / "dataset_dict.json")["splits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot read {place / 'dataset_dict.json'}: {error}") from None
        place = place / split
    if split not in there:
        raise DataError(f"data.path={path}: there is no split {split!r}, but {', '.join(there)}")
    return Dataset.load_from_disk(str(place))


@contextmanager
def _quick_to_fail(path: str, *, is_local: bool) -> Iterator[None]:
    """Without a network, `datasets` tries for half a minute; so ask the hub once, and if it cannot
    be reached, let the library look only at what it has."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    was_offline = (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    if not is_local and not any(was_offline):
        try:
            HfApi().dataset_info(path, timeout=_HUB_TIMEOUT_S)
        except (RepositoryNotFoundError, HFValidationError):
            raise DataError(
                f"data.path={path}: there is no such file or folder here, and no such dataset on "
                "the hub that you may read"
            ) from None
        except HfHubHTTPError:
            pass  # the hub is there; load_dataset reports its answer better
        except Exception:  # each HTTP library has its own errors
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was_offline


def _sentence(path: str, subset: str | None, split: str, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__  # the outer ones say only that something went wrong
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]
    if isinstance(error, ConnectionError):
        return (
            f"data.path={path}: there is no such file or folder here, the hub cannot be reached "
            f"({reason}), and it was not fetched before; go online once, or give a folder"
        )
    chosen = f"split {split!r}" if subset is None else f"subset {subset!r}, split {split!r}"
    return f"data.path={path}: cannot open the dataset ({chosen}): {reason}"


Wanted = Mapping[Literal["text_column", "image_column", "label_column"], str | None]
_LABELS = ("label", "labels", "class", "target")  # names that are tried before giving up


def is_text(feature: Any) -> bool:
    """Whether a feature of a dataset is a plain string."""
    return getattr(feature, "dtype", None) in ("string", "large_string") and not is_label(feature)


def is_image(feature: Any) -> bool:
    """Whether a feature of a dataset is an image."""
    return type(feature).__name__ == "Image"


def is_label(feature: Any) -> bool:
    """Whether a feature of a dataset is a class with a name."""
    return type(feature).__name__ == "ClassLabel"


def is_class(feature: Any) -> bool:
    """Whether the values of a feature can number or name classes."""
    kinds = ("int", "uint", "bool", "string", "large_string")
    return str(getattr(feature, "dtype", "")).startswith(kinds)


def has_images(features: Mapping[str, Any], wanted: Wanted) -> bool:
    """Whether images are read: an image or label column is named, or there are images and no text
    column is named."""
    if wanted["text_column"]:
        return False
    asked = wanted["image_column"] or wanted["label_column"]
    return bool(asked) or any(map(is_image, features.values()))


def text_column(features: Mapping[str, Any], wanted: Wanted) -> str:
    """The column of text; raises DataError naming the columns there are."""
    texts = [name for name, feature in features.items() if is_text(feature)]
    name = wanted["text_column"]
    if name is None:
        if "text" in texts:
            return "text"
        if len(texts) == 1:
            return texts[0]
        how_many = "no column of text" if not texts else f"{len(texts)} columns of text"
        raise DataError(
            f"the dataset has {how_many}: set data.text_column=NAME; {_there(features)}"
        )
    _check_there(features, "text_column", name)
    if name not in texts:
        raise DataError(f"data.text_column={name}: is not text; {_there(features)}")
    return name


def image_columns(features: Mapping[str, Any], wanted: Wanted) -> tuple[str, str]:
    """The columns of images and of their classes; raises DataError naming the existing columns."""
    images = [name for name, feature in features.items() if is_image(feature)]
    labels = [name for name, feature in features.items() if is_label(feature)]
    labels = labels or [name for name in _LABELS if name in features][:1]
    image = _only("image_column", wanted["image_column"], images, features)
    label = _only("label_column", wanted["label_column"], labels, features)
    if image not in images:
        raise DataError(f"data.image_column={image}: holds no images; {_there(features)}")
    if not is_class(features[label]):
        raise DataError(
            f"data.label_column={label}: holds no classes, which are integers or names; "
            f"{_there(features)}"
        )
    return image, label


def _only(
    key: Literal["image_column", "label_column"],
    name: str | None,
    found: list[str],
    features: Mapping[str, Any],
) -> str:
    if name is not None:
        _check_there(features, key, name)
        return name
    if len(found) != 1:
        how_many = "none" if not found else ", ".join(found)
        raise DataError(f"data.{key}=NAME is needed (found {how_many}); {_there(features)}")
    return found[0]


def _check_there(features: Mapping[str, Any], key: str, name: str) -> None:
    if name not in features:
        raise DataError(f"data.{key}={name}: there is no such column; {_there(features)}")


def _there(features: Mapping[str, Any]) -> str:
    kinds = {
        name: "image"
        if is_image(feature)
        else str(getattr(feature, "dtype", type(feature).__name__))
        for name, feature in features.items()
    }
    return "its columns: " + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


# Documents without text are skipped; so many in a row mean that the column is missing.
_MOST_EMPTY = 1000


class DatasetDocuments:
    """`open_dataset()` gives an `IterableDataset`, a new one for each pass; `pick_column(dataset)`
    says which column is read; `name` is for errors."""

    def __init__(
        self, open_dataset: Callable[[], Any], pick_column: Callable[[Any], str], name: str
    ) -> None:
        self._open_dataset = open_dataset
        self._pick_column = pick_column
        self._name = name
        self._column = ""  # picked when the first pass begins
        self._dataset: Any = None

    def documents(self, start: int, place: Mapping[str, Any] | None) -> Iterator[str]:
        """One pass from document `start` on, empty where one has no text; `place` is what `place()`
        said there, or None."""
        number = start
        try:
            # The state of a dataset is a place that it returns to with every pass, so each pass
            # has a dataset of its own.
            self._dataset = self._open()
            if place is not None:
                self._dataset.load_state_dict(dict(place))
            # Counted by hand: the places of `dataset.skip(n)` mean nothing to the dataset itself.
            examples = itertools.islice(self._dataset, 0 if place is not None else start, None)
            num_empty = 0
            for example in examples:
                text = self._text(example, number)
                num_empty = 0 if text else num_empty + 1
                if num_empty > _MOST_EMPTY:
                    raise DataError(
                        f"the last {num_empty} documents of {self._name}, up to {number}, have no "
                        f"text in the column {self._column!r}"
                    )
                yield text
                number += 1
        except DataError:
            raise
        except Exception as error:  # whatever a library meets on a disk or in a network
            reason = str(error).strip().splitlines() or [""]
            raise DataError(
                f"{self._name} cannot be read on from document {number}: "
                f"{type(error).__name__}: {reason[0]}"
            ) from error

    def place(self) -> dict[str, Any] | None:
        """Where the pass stands after its last document, as JSON; None: only counting finds it."""
        try:
            state: dict[str, Any] = self._dataset.state_dict()
            return state if json.loads(json.dumps(state)) == state else None
        except Exception:  # a dataset without a state: the position is found by counting
            return None

    def _open(self) -> Any:
        dataset = self._open_dataset()
        if not self._column:
            self._column = self._pick_column(dataset)
        # Other columns may be images, which would be decoded in vain.
        return dataset.select_columns([self._column]) if dataset.features else dataset

    def _text(self, example: Mapping[str, Any], number: int) -> str:
        if self._column not in example:
            raise DataError(
                f"document {number} of {self._name} has no column {self._column!r}; "
                f"it has {', '.join(map(repr, example)) or 'none'}"
            )
        text = example[self._column]
        if not isinstance(text, str | None):
            raise DataError(
                f"the column {self._column!r} of document {number} of {self._name} holds a "
                f"{type(text).__name__}, not text"
            )
        return text if text and not text.isspace() else ""
