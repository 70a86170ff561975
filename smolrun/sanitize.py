"""Text that was not typed here, made safe to show and to keep: host answers, logs, run folders.

Everything that tasks and the command line print goes through `echo`. Text that is to be one line,
or part of one, goes through `one_line`; text of several lines that others wrote through `indented`,
so that it cannot begin a line of ours.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from smolrun.files import to_null_device

# user:password@, or a token alone, between a scheme and a host: RFC 3986, section 3.2.1.
_USERINFO = re.compile(r"(?<=://)[^\s/?#]+@")
HIDDEN = "://***@"
# Names of keys whose text is a secret: words of them, and their ends.
_SECRET_WORDS = frozenset(["token", "secret", "password", "passphrase", "apikey", "credential"])
_SECRET_PAIRS = ("api_key", "access_key", "private_key", "secret_key")


def printable(text: str) -> str:
    """The text without what terminals obey or hide: control characters (C0 and C1, so no escape
    sequence is left), bidi overrides, invisible characters. Line ends and tabs stay."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def one_line(text: str) -> str:
    """As `printable`, and with a space for every line end and tab."""
    return "".join(c if c.isprintable() else " " for c in text)


def indented(text: str) -> str:
    """As `printable`, and with two spaces before every line but the first."""
    return printable(text).replace("\n", "\n  ")


def all_in_one_line(value: Any) -> Any:
    """A JSON value in which every text, names of keys too, went through `one_line`."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, list):
        return [all_in_one_line(item) for item in value]
    if isinstance(value, dict):
        return {one_line(key): all_in_one_line(item) for key, item in value.items()}
    return value


def echo(text: object = "", *, error: bool = False) -> None:
    """Print a `printable` text to stdout or, an `error`, to stderr. What the stream cannot encode
    is escaped; once its reader has left, such as `head`, all else goes nowhere."""
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    shown = printable(str(text)).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(shown, file=stream, flush=True)
    except BrokenPipeError:
        to_null_device(stream.fileno())


def without_credentials(text: str) -> str:
    """The text with `***` for the user and password of every URL in it."""
    return _USERINFO.sub("***@", text)


def without_credentials_in(env: Mapping[str, str]) -> dict[str, str]:
    """The variables with `without_credentials` of their values."""
    return {name: without_credentials(value) for name, value in env.items()}


def without_secrets(values: Any) -> Any:
    """A copy in which the text of every key that is called a secret is hidden."""
    if isinstance(values, list):
        return [without_secrets(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        key: "hidden" if isinstance(value, str) and _is_secret(key) else without_secrets(value)
        for key, value in values.items()
    }


def _is_secret(key: str) -> bool:
    words = {word.removesuffix("s") for word in key.lower().replace("-", "_").split("_")}
    return not _SECRET_WORDS.isdisjoint(words) or key.lower().endswith(_SECRET_PAIRS)
