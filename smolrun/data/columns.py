"""Which columns of a dataset hold what is to be learnt: named by the user, or the only ones.

Looks at a dataset's features only, by their names and kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from smolrun.errors import DataError

Wanted = Mapping[Literal["text_column", "image_column", "label_column"], str | None]
_LABELS = ("label", "labels", "class", "target")  # names that are tried before giving up


def is_text(feature: Any) -> bool:
    """Whether a feature of a dataset is a plain string."""
    return getattr(feature, "dtype", None) in ("string", "large_string") and not is_label(feature)


def is_image(feature: Any) -> bool:
    """Whether a feature of a dataset is a picture."""
    return type(feature).__name__ == "Image"


def is_label(feature: Any) -> bool:
    """Whether a feature of a dataset is a class with a name."""
    return type(feature).__name__ == "ClassLabel"


def is_class(feature: Any) -> bool:
    """Whether the values of a feature can number or name classes."""
    kinds = ("int", "uint", "bool", "string", "large_string")
    return str(getattr(feature, "dtype", "")).startswith(kinds)


def has_pictures(features: Mapping[str, Any], wanted: Wanted) -> bool:
    """Whether a dataset is about pictures: the user says so, or it has some and no text asked."""
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
            f"the dataset has {how_many}: say data.text_column=NAME; {_there(features)}"
        )
    _check_there(features, "text_column", name)
    if name not in texts:
        raise DataError(f"data.text_column={name}: is no text; {_there(features)}")
    return name


def image_columns(features: Mapping[str, Any], wanted: Wanted) -> tuple[str, str]:
    """The columns of pictures and of their classes; raises DataError naming the columns there."""
    images = [name for name, feature in features.items() if is_image(feature)]
    labels = [name for name, feature in features.items() if is_label(feature)]
    labels = labels or [name for name in _LABELS if name in features][:1]
    image = _only("image_column", wanted["image_column"], images, features)
    label = _only("label_column", wanted["label_column"], labels, features)
    if image not in images:
        raise DataError(f"data.image_column={image}: holds no pictures; {_there(features)}")
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
