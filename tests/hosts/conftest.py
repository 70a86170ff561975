"""Labs for tests. A test that breaks a host heals it, or takes a lab of its own by `make_lab`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.hosts.lab import Lab, lab, missing

Maker = Callable[..., Lab]


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips where there can be no lab, and says why."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def lab3(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts at 1 Gbit/s, the same for all tests of a module."""
    with lab(hosts=3, folder=tmp_path_factory.mktemp("lab3")) as the_lab:
        yield the_lab


@pytest.fixture
def make_lab(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    """Makes labs of the test's own: `make_lab(hosts=2, rate="200mbit")`."""
    with ExitStack() as stack:

        def make(**options: Any) -> Lab:
            folder = tmp_path_factory.mktemp("lab")
            return stack.enter_context(lab(folder=folder, **options))

        yield make
