"""The built page: it belongs to its source, and how its files are sent."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smolrun.serving.access import AccessPolicy
from smolrun.serving.page import page_files
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, says, served

SOURCE = Path(__file__).parents[2] / "smolrun/ui/web"
PARTS = ("index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts")
MOST_ZIPPED_BYTES = 400_000


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that wants a key."""
    policy = AccessPolicy(api_key="secret")
    with served(FakeEngine(says("Hello")), tmp_path_factory.mktemp("page"), policy) as one:
        yield one


def test_the_built_page_is_that_of_the_source():
    folders = [
        f"{name}/{one.name}" for name in ("public", "src") for one in (SOURCE / name).iterdir()
    ]
    digest = hashlib.sha256()
    for name in sorted([*PARTS, *folders]):
        data = (SOURCE / name).read_bytes()
        digest.update(f"{name}\n".encode())
        digest.update(data if name.endswith(".png") else data.replace(b"\r\n", b"\n"))
    built = files("smolrun.serving").joinpath("page/source.sha256").read_text(encoding="utf-8")
    assert digest.hexdigest() == built.strip(), "run `make page`"


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
def test_a_build_gives_the_page_that_is_committed(tmp_path: Path):
    web = tmp_path / "smolrun/ui/web"
    shutil.copytree(SOURCE, web, ignore=shutil.ignore_patterns("node_modules"))
    for command in (["npm", "ci", "--no-audit", "--no-fund"], ["npm", "run", "build"]):
        subprocess.run(command, cwd=web, check=True, timeout=300)
    built = tmp_path / "smolrun/serving/page"
    committed = SOURCE.parents[1] / "serving/page"
    assert contents(built) == contents(committed)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        one.relative_to(folder).as_posix(): one.read_bytes()
        for one in folder.rglob("*")
        if one.is_file()
    }


def test_the_page_and_its_files_need_no_key_and_nothing_of_another_server(locked: Served):
    for path, file in page_files().items():
        answer = locked.client.get(path)
        assert answer.status_code == 200 and answer.content == file.data, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert locked.client.get("/config").status_code == 401
    assert locked.client.get("/cluster").status_code == 401
    assert b"://" not in page_files()["/"].data


def test_the_page_may_ask_the_servers_it_compares_with_and_no_others():
    alone, beside = page_files()["/"], page_files(("http://mini1:7665",))["/"]
    request: Any = SimpleNamespace(headers={})
    policies = [
        asyncio.run(one.response(request)).headers["content-security-policy"]
        for one in (alone, beside)
    ]
    assert [policy.partition("connect-src ")[2] for policy in policies] == [
        "'self'",
        "'self' http://mini1:7665",
    ]
    # Browsers keep the old policy with a 304.
    assert alone.tag != beside.tag


def test_the_page_is_small_enough_for_a_slow_network(locked: Served):
    total = 0
    for path in page_files():
        with locked.client.stream("GET", path, headers={"accept-encoding": "gzip"}) as answer:
            data = b"".join(answer.iter_raw())
        total += len(data)
        if answer.headers.get("content-encoding") == "gzip":
            assert gzip.decompress(data) == page_files()[path].data
    assert total < MOST_ZIPPED_BYTES


def test_what_the_browser_has_is_not_sent_again(locked: Served):
    first = locked.client.get("/assets/index.js")
    assert first.headers["content-type"].startswith("text/javascript")
    again = locked.client.get("/assets/index.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize("path", ["/assets/", "/assets/../api.py", "/source.sha256", "/index.html"])
def test_no_other_file_can_be_asked_for(locked: Served, path: str):
    headers = {"authorization": "Bearer secret"}
    assert locked.client.get(path, headers=headers).status_code == 404


def test_the_machines_are_told(locked: Served):
    found = locked.client.get("/cluster", headers={"authorization": "Bearer secret"}).json()
    assert found["status"] == "ready" and found["stages"] == [] and found["running"] == 0
