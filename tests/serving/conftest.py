"""Fixtures of the serving tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolrun.serving.access import AccessPolicy
from tests.models.conftest import one_thread
from tests.serving.browser_tab import Tab
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, says, served

__all__ = ["one_thread"]  # a fixture of every test here


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one; needs `pip install playwright` and a chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a chromium")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        one = started.chromium.launch(executable_path=chromium, args=arguments)
        yield one
        one.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Tab]]:
    """Tabs, each of a browser of its own unless `beside` another."""
    contexts: list[Any] = []

    def open_tab(url: str, beside: Tab | None = None, **settings: Any) -> Tab:
        if beside is not None:
            return Tab(beside.page.context, url).open()
        script = settings.pop("script", None)
        contexts.append(browser.new_context(**settings))
        if script:
            contexts[-1].add_init_script(script)
        return Tab(contexts[-1], url).open()

    yield open_tab
    for context in contexts:
        context.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Whole servers with a scripted engine, one a test."""
    running: list[Any] = []

    def start(text: str, policy: AccessPolicy | None = None, **engine: Any) -> Served:
        context = served(FakeEngine(says(text), **engine), tmp_path, policy)
        running.append(context)
        return context.__enter__()

    yield start
    for context in running:
        context.__exit__(None, None, None)
