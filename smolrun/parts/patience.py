"""How long a worker waits for the answer to its own push: a share of its computing time, and only
where answers come in that time.

    answers are quick    [ compute ][ push, weights ][ compute ][ push, weights ]   age N - 1
    answers are slow     [ compute ][ compute ][ compute ]                          age 2 N - 1
                                  push, weights ...

Weights that lack a worker's own last push lack those of its time from everybody else, so the next
gradient is about twice as late. Where a round trip is short beside the computing, waiting for it is
the better bargain; where it is long, time belongs to computing.

Pure: times are given, in seconds."""

from __future__ import annotations


class Patience:
    """`share` of the computing time of a ticket, 0 for none at all."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._began_s = 0.0
        self._limit_s = 0.0  # of a wait, after the last ticket
        self._pushed_s: float | None = None  # None: there is no answer to wait for
        self._answer_took_s = 0.0  # as far as known; hopes until it has seen one

    def begin(self, now_s: float) -> None:
        """A ticket is begun."""
        self._began_s = now_s

    def push(self, now_s: float) -> None:
        """Its gradient leaves."""
        self._limit_s = self._share * (now_s - self._began_s)
        if self._pushed_s is not None:  # no answer to the last one: it takes longer than this
            self._answer_took_s = now_s - self._pushed_s
        self._pushed_s = now_s

    def answer(self, now_s: float) -> None:
        """The weights that are here have that gradient in them."""
        if self._pushed_s is not None:
            self._answer_took_s = now_s - self._pushed_s
            self._pushed_s = None

    def left_s(self, now_s: float) -> float:
        """How much longer to wait."""
        if self._pushed_s is None or self._answer_took_s > self._limit_s:
            return 0.0
        return max(0.0, self._pushed_s + self._limit_s - now_s)
