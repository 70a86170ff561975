"""Text that was not typed here, made safe to show and to keep: host answers, logs, run folders."""

from __future__ import annotations

import re
from collections.abc import Mapping

# user:password@, or a token alone, between a scheme and a host: RFC 3986, section 3.2.1.
_USERINFO = re.compile(r"(?<=://)[^\s/?#]+@")
HIDDEN = "://***@"


def without_credentials(text: str) -> str:
    """The text with `***` for the user and password of every URL in it."""
    return _USERINFO.sub("***@", text)


def without_credentials_in(env: Mapping[str, str]) -> dict[str, str]:
    """The variables with `without_credentials` of their values."""
    return {name: without_credentials(value) for name, value in env.items()}
