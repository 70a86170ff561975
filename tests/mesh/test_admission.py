"""Which unauthenticated connection is evicted, without a socket."""

from __future__ import annotations

from dataclasses import dataclass

from smolrun.mesh.admission import MAX_PER_ORIGIN, MAX_UNAUTHENTICATED, UnauthenticatedPool


@dataclass(eq=False)
class FakeConnection:
    number: int
    has_received: bool = False


def add_many(pool: UnauthenticatedPool, origin: str, count: int) -> list[FakeConnection]:
    """Adds `count` connections; returns the evicted ones."""
    evicted = []
    for number in range(count):
        if evicted_one := pool.evict_for(origin):
            evicted.append(evicted_one)
        pool.add(FakeConnection(number), origin)
    return evicted


def test_the_oldest_connection_of_an_origin_is_evicted_first() -> None:
    pool = UnauthenticatedPool({})
    evicted = add_many(pool, "10.0.0.9", 1000)
    assert [one.number for one in evicted] == list(range(1000 - MAX_PER_ORIGIN))
    assert len(pool) == MAX_PER_ORIGIN


def test_one_origin_does_not_evict_another() -> None:
    pool = UnauthenticatedPool({})
    honest = FakeConnection(0)
    pool.add(honest, "10.0.0.1")
    assert honest not in add_many(pool, "10.0.0.9", 1000)


def test_many_origins_share_the_pool_and_the_largest_one_is_evicted_from() -> None:
    pool = UnauthenticatedPool({})
    for origin in range(1000):
        evicted = add_many(pool, f"10.0.1.{origin}", 1)
        assert len(pool) <= MAX_UNAUTHENTICATED
        assert bool(evicted) == (origin >= MAX_UNAUTHENTICATED)


def test_a_connection_that_has_sent_is_evicted_last() -> None:
    pool = UnauthenticatedPool({})
    honest = FakeConnection(-1, has_received=True)
    pool.add(honest, "127.0.0.1")
    assert honest not in add_many(pool, "127.0.0.1", 1000)


def test_all_ranks_of_one_host_fit() -> None:
    pool = UnauthenticatedPool({"127.0.0.1": 64})
    assert add_many(pool, "127.0.0.1", 64 * 3) == []


def test_a_discarded_connection_is_not_counted() -> None:
    pool = UnauthenticatedPool({})
    for number in range(100):
        one = FakeConnection(number)
        assert pool.evict_for("10.0.0.9") is None
        pool.add(one, "10.0.0.9")
        pool.discard(one)
    assert len(pool) == 0
