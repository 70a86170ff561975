"""Numbers, ranks and times as text."""

from __future__ import annotations

from collections.abc import Sequence


def rate(per_second: float) -> str:
    """`12,345`, or `1.8` below 10."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"


def counted(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`, `3 micro-batches`."""
    plural = f"{what}es" if what.endswith(("s", "x", "ch", "sh")) else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def named(ranks: Sequence[int]) -> str:
    """`rank 1`, `ranks 0 and 1`, `ranks 0, 1 and 2`."""
    *first, last = [str(rank) for rank in ranks]
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:01:05."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def duration(seconds: float) -> str:
    """A time in its largest unit: 0.35 s, 40 s, 3 min, 1.5 h, 36 h, 4 d."""
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= (1 if unit != "d" else 2) * length_s:
            return f"{_short(seconds / length_s)} {unit}"
    return f"{seconds:.2g} s" if 0 < seconds < 10 else f"{seconds:.0f} s"


def _short(number: float) -> str:
    """One decimal below ten, without a trailing zero."""
    return f"{number:.0f}" if number >= 9.95 else f"{number:.1f}".removesuffix(".0")


def number(value: float | None) -> str:
    """A loss with four decimals; None is not a number."""
    return "not a number" if value is None else f"{value:.4f}"


def accuracy(share: float) -> str:
    """`accuracy 93.1 %`."""
    return f"accuracy {share * 100:.1f} %"


def size(num_bytes: float) -> str:
    """Bytes as disks are sold: 1 MB is a million."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def aligned(rows: Sequence[Sequence[str]], room: int | None = None, *, least: int = 1) -> list[str]:
    """Rows of equally many cells as lines. With `room` characters the last columns that do not fit
    are left out, but never the first `least`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = list(range(len(widths)))
    while room is not None and len(shown) > least and sum(widths[n] + 2 for n in shown) - 2 > room:
        shown.pop()
    return ["  ".join(cells[n].ljust(widths[n]) for n in shown).rstrip() for cells in rows]
