"""Pairing codes: what they look like, and how often a wrong one may be tried.

A code has 40 bits. Three wrong tries retire it, so a stranger hits it with a probability of 3e-12;
if it made a code retire every second for a whole day, with 3e-7. Knows nothing of sockets.
"""

from __future__ import annotations

import ipaddress
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from smolrun.launch.nearby.messages import TooManyWrongCodes, WrongCode

TRIES = 3  # wrong ones, then the code is retired
# Crockford's base 32: no I, L, O, U.
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LOOK_ALIKE = str.maketrans("ILO", "110")
_CODE_CHARS = 8
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0  # after a wrong code, doubled each time
_ADDRESSES = 1024  # that are kept with their wrong tries
_TURN_S = 10.0  # so long a try waits while others are under way


def new_code() -> str:
    """Two groups of four characters, 40 bits: `7KQM-3XWP`."""
    chars = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_CHARS))
    return f"{chars[:4]}-{chars[4:]}"


def normalized(code: str) -> str:
    """A code as typed by a person (lower case, without the dash, O for 0, I or L for 1) as
    `new_code` writes it. WrongCode if it cannot be one."""
    chars = code.upper().translate(_LOOK_ALIKE)
    chars = "".join(c for c in chars if c not in " -\t\r\n")
    if len(chars) != _CODE_CHARS or not set(chars) <= set(_ALPHABET):
        raise WrongCode("a pairing code has 8 letters and digits, as 7KQM-3XWP")
    return f"{chars[:4]}-{chars[4:]}"


class CodeKeeper:
    """The code that is shown, and who tried how often. Thread-safe.

    Tries that are under way count as wrong until they are right, so that many at once are not more
    guesses than TRIES. `on_code` is called with each new code, the first one too.
    """

    def __init__(
        self, on_code: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_code = on_code
        self._clock = clock
        self._changed = threading.Condition()
        self._wrong = 0
        self._under_way = 0
        # Origin -> wrong tries, and until when it has to wait.
        self._origins: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self.code = new_code()
        on_code(self.code)

    def begin(self, address: str, timeout_s: float = _TURN_S) -> str:
        """The code that a try is compared with; `end` must follow. Blocks while TRIES are under
        way. TooManyWrongCodes where the address has to wait."""
        with self._changed:
            origin = _origin(address)
            self._refuse_early(origin)
            if not self._changed.wait_for(lambda: self._wrong + self._under_way < TRIES, timeout_s):
                raise TooManyWrongCodes(_FIRST_WAIT_S)
            self._refuse_early(origin)  # others of its tries may have ended meanwhile
            self._under_way += 1
            return self.code

    def end(self, address: str, code: str, *, is_right: bool) -> None:
        """A try has ended. A wrong one counts only against the code that it was compared with."""
        with self._changed:
            if is_right:
                self._origins.pop(_origin(address), None)
            else:
                self._count_against(_origin(address))
            if code == self.code:
                self._under_way -= 1
                self._wrong += not is_right
            if self._wrong >= TRIES:
                self._wrong = self._under_way = 0
                self.code = new_code()
                self._on_code(self.code)
            self._changed.notify_all()

    def _refuse_early(self, origin: str) -> None:
        wait_s = self._origins.get(origin, (0, 0.0))[1] - self._clock()
        if wait_s > 0:
            raise TooManyWrongCodes(wait_s)

    def _count_against(self, origin: str) -> None:
        tries, _ = self._origins.pop(origin, (0, 0.0))
        wait_s = min(_FIRST_WAIT_S * 2 ** min(tries, 10), _LONGEST_WAIT_S)
        self._origins[origin] = (tries + 1, self._clock() + wait_s)
        while len(self._origins) > _ADDRESSES:
            self._origins.popitem(last=False)


def _origin(address: str) -> str:
    """What has to wait after a wrong try: an IPv4 address, or the /64 of an IPv6 one, as a machine
    can take any address of it."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))
