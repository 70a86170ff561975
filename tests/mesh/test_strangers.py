"""Who must leave the door for whom: decided without a socket."""

from __future__ import annotations

from dataclasses import dataclass

from smolrun.mesh.admission import MAX_PER_ORIGIN, MAX_UNAUTHENTICATED, UnauthenticatedPool


@dataclass(eq=False)
class Somebody:
    number: int
    has_received: bool = False


def crowd(strangers: UnauthenticatedPool[Somebody], origin: str, count: int) -> list[Somebody]:
    """Lets so many come; returns those who had to leave."""
    left = []
    for number in range(count):
        if leaving := strangers.evict_for(origin):
            left.append(leaving)
        strangers.add(Somebody(number), origin)
    return left


def test_the_oldest_of_one_origin_leaves_for_a_new_one() -> None:
    strangers: UnauthenticatedPool[Somebody] = UnauthenticatedPool({})
    left = crowd(strangers, "10.0.0.9", 1000)
    assert [one.number for one in left] == list(range(1000 - MAX_PER_ORIGIN))
    assert len(strangers) == MAX_PER_ORIGIN


def test_one_origin_does_not_drive_out_another() -> None:
    strangers: UnauthenticatedPool[Somebody] = UnauthenticatedPool({})
    honest = Somebody(0)
    strangers.add(honest, "10.0.0.1")
    assert honest not in crowd(strangers, "10.0.0.9", 1000)


def test_many_origins_share_the_whole_door_and_the_most_crowded_one_loses() -> None:
    strangers: UnauthenticatedPool[Somebody] = UnauthenticatedPool({})
    for origin in range(1000):
        left = crowd(strangers, f"10.0.1.{origin}", 1)
        assert len(strangers) <= MAX_UNAUTHENTICATED
        assert bool(left) == (origin >= MAX_UNAUTHENTICATED)


def test_who_has_received_leaves_last() -> None:
    strangers: UnauthenticatedPool[Somebody] = UnauthenticatedPool({})
    honest = Somebody(-1, has_received=True)
    strangers.add(honest, "127.0.0.1")
    assert honest not in crowd(strangers, "127.0.0.1", 1000)


def test_all_ranks_of_one_host_find_room() -> None:
    strangers: UnauthenticatedPool[Somebody] = UnauthenticatedPool({"127.0.0.1": 64})
    assert crowd(strangers, "127.0.0.1", 64 * 3) == []


def test_who_has_gone_takes_no_room() -> None:
    strangers: UnauthenticatedPool[Somebody] = UnauthenticatedPool({})
    for number in range(100):
        one = Somebody(number)
        assert strangers.evict_for("10.0.0.9") is None
        strangers.add(one, "10.0.0.9")
        strangers.discard(one)
    assert len(strangers) == 0
