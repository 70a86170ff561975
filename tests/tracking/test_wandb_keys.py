"""What goes to W&B by name: ids, and whether there is a key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smolrun.tracking.wandb import EventReader, has_key, run_id
from tests.tracking.fake_wandb import KEY


def test_ids_are_legal_and_stay_unique():
    assert run_id(Path("outputs/20260131-142501-classicdp-gpt_tiny-3fa9")) == (
        "20260131-142501-classicdp-gpt_tiny-3fa9"
    )
    long = run_id(Path("20260131-142501-" + "a.b" * 30 + "-3fa9"))
    assert len(long) <= 64
    assert long.startswith("20260131-142501-a-b")
    assert long.endswith("-3fa9")


def test_jobs_of_two_sweeps_have_ids_of_their_own_also_with_one_name(tmp_path: Path):
    names = ["optimizer.lr=0.1,seed=1", "optimizer.lr=0.1,seed=2", "a" * 100]
    folders = [tmp_path / sweep / name for sweep in ("20260131-1", "20260131-2") for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder.parent / "sweep.yaml").touch()
    ids = [run_id(folder) for folder in folders]
    assert len(set(ids)) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", one) for one in ids)
    assert ids[0].startswith("optimizer-lr-0-1-seed-1-")


def test_a_job_that_starts_over_is_another_run_in_wandb(tmp_path: Path):
    (tmp_path / "sweep.yaml").touch()
    ids = []
    for aside in (None, ".lr=1.1", ".lr=1.2"):
        if aside is not None:
            (tmp_path / aside).mkdir()
        ids.append(run_id(tmp_path / "lr=1"))
    assert len(set(ids)) == 3
    (tmp_path / ".lr=1.5.1").mkdir()  # of the job lr=1.5
    assert run_id(tmp_path / "lr=1") == ids[2]


def test_a_key_is_found_where_wandb_login_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_key("https://api.wandb.ai")
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    assert has_key("https://api.wandb.ai")
    assert not has_key("http://wandb.home")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert has_key("http://wandb.home")


def test_lines_that_are_not_whole_yet_wait_and_broken_ones_are_passed_over(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "step"}\n{"event": "ev')
    with path.open("rb") as file:
        lines = EventReader(file)
        assert list(lines) == [{"event": "step"}]
        with path.open("ab") as more:
            more.write(b'al"}\nbroken\n[1]\n{"event": "note"}\n')
        assert list(lines) == [{"event": "eval"}, {"event": "note"}]
