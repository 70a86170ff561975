"""Numbers, ranks and times as people write them."""

from __future__ import annotations

from collections.abc import Sequence


def rate(per_second: float) -> str:
    """`12,345`, or `1.8` where whole numbers would hide it."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"


def counted(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def named(ranks: Sequence[int]) -> str:
    """`rank 1`, `ranks 0 and 1`, `ranks 0, 1 and 2`."""
    *first, last = [str(rank) for rank in ranks]
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:01:05."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def number(value: float | None) -> str:
    """A loss, which may be none."""
    return "not a number" if value is None else f"{value:.4f}"
