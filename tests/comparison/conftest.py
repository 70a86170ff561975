from __future__ import annotations

import pytest

from smolrun.comparison import plots


@pytest.fixture
def with_plots() -> None:
    """For tests of the plots: the others are made without them, which take their time."""


@pytest.fixture(autouse=True)
def _without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "with_plots" not in request.fixturenames:
        monkeypatch.setattr(plots, "can_plot", lambda: False)
