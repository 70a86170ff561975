"""How fast this machine computes and what links carry, as far as a dry run knows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from smolrun.config import RunConfig
from smolrun.tracking.formatting import duration

_MATRIX = 512  # large enough for a core to be as fast as it gets
_BLOCK = 8 * 2**20  # numbers; larger than caches
_MEASURE_S = 0.2
_LINKS_GBPS = (1.0, 10.0)


@functools.cache
def measure_speed() -> tuple[float, float]:
    """Operations per second of matrix products, and bytes per second of sums, on all cores."""
    matrix, block = torch.ones(_MATRIX, _MATRIX), torch.ones(_BLOCK)
    best_product = best_sum = float("inf")
    end = time.perf_counter() + _MEASURE_S
    while (began := time.perf_counter()) < end:
        matrix @ matrix
        best_product = min(best_product, time.perf_counter() - began)
    end = time.perf_counter() + _MEASURE_S
    while (began := time.perf_counter()) < end:
        block.add_(1.0)
        best_sum = min(best_sum, time.perf_counter() - began)
    return 2 * _MATRIX**3 / best_product, 2 * block.nbytes / best_sum


def links_gbps(config: RunConfig) -> tuple[float, ...]:
    """What links may carry, the first one to reckon with: the slowest that is emulated."""
    emulated = [host.emulate for host in config.cluster.hosts or [] if host.emulate]
    rates = [each.bandwidth_mbps for each in emulated if each.bandwidth_mbps]
    return (min(rates) / 1000,) if rates else _LINKS_GBPS


def times_on_links(config: RunConfig, seconds: Callable[[float], float]) -> str:
    """Such as 0.02 s at 50 Mbit/s (as emulated); `seconds` of so many Gbit/s."""
    links = links_gbps(config)
    times = ", ".join(f"{duration(seconds(gbps))} at {rate_text(gbps)}" for gbps in links)
    return f"{times} ({_link_source(links)})"


def _link_source(links: tuple[float, ...]) -> str:
    """Where these come from."""
    return "as emulated" if links != _LINKS_GBPS else "the links have not been measured"


def rate_text(gbps: float) -> str:
    """Such as 100 Mbit/s."""
    return f"{gbps:g} Gbit/s" if gbps >= 1 else f"{1000 * gbps:g} Mbit/s"


def size_text(size: float) -> str:
    """Such as 1.5 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
