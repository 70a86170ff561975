"""The door to the library `datasets`: opens a dataset of the hub, a folder or a file, in sentences.

No code of a dataset runs: `datasets` reads data files only since its version 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
            pass  # the hub is there; what it thinks of the request, load_dataset says better
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
