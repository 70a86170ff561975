"""Several trackers on one run: all hear all, and one that breaks hurts nobody."""

from __future__ import annotations

from smolrun.events import EvalDone, Event
from smolrun.tracking.trackers import Fanout


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_closed = False

    def record(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.is_closed = True


class Broken(Listener):
    def record(self, event: Event) -> None:
        super().record(event)
        if len(self.events) == 2:
            raise OSError("no space left on device")


class BrokenAtTheEnd(Listener):
    def close(self) -> None:
        raise ValueError("cannot close")


def test_all_trackers_hear_all_events_in_order() -> None:
    listeners = [Listener(), Listener()]
    fanout = Fanout(listeners, warn=lambda text: None)
    events = [EvalDone(step, 1.0, 8) for step in range(3)]
    for event in events:
        fanout.record(event)
    fanout.close()
    assert all(listener.events == events and listener.is_closed for listener in listeners)


def test_a_tracker_that_raises_is_switched_off_with_one_warning() -> None:
    warnings: list[str] = []
    broken, sound = Broken(), Listener()
    fanout = Fanout([broken, sound], warn=warnings.append)
    for step in range(5):
        fanout.record(EvalDone(step, 1.0, 8))
    fanout.close()
    assert len(broken.events) == 2
    assert len(sound.events) == 5
    assert warnings == [
        "the tracker Broken broke (OSError: no space left on device); "
        "it is disabled, the run continues"
    ]


def test_a_tracker_that_cannot_close_keeps_nobody_else_from_it() -> None:
    warnings: list[str] = []
    sound = Listener()
    Fanout([BrokenAtTheEnd(), sound], warn=warnings.append).close()
    assert sound.is_closed
    assert "cannot close" in warnings[0]
