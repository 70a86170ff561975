"""Runs on a stream, as a user starts them: a folder of documents, real processes, one reader."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.tasks.test_resume import assert_same, state_of, train
from tests.tasks.test_whole_runs import rows, summary

pytest.importorskip("datasets")

STEPS = 24
STREAM = [
    "data=hf",
    "data.streaming=true",
    "data.eval_documents=10",
    "data.block_documents=16",
    "data.prefetch_steps=3",
    "data.tokenizer=bytes",
    "data.sequence_length=16",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "precision=float64",
    f"training.steps={STEPS}",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.eval_batches=1",
    "training.sample_tokens=0",
    "staleness.bound=2",
]


def write_documents(folder: Path, count: int = 400) -> None:
    """Every one is different; two passes or more are needed for the run above."""
    folder.mkdir()
    dice = random.Random(5)
    texts = [f"{number} " * dice.randint(0, 12) for number in range(count)]
    for part in range(2):
        lines = [json.dumps({"text": text}) for text in texts[part::2]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    write_documents(folder / "docs", 80)
    docs = f"data.path={folder / 'docs'}"
    code, out, err = train(folder, *STREAM, docs, "checkpoint.every=7", "checkpoint.keep=9")
    assert code == 0, err
    assert "sequences; train a stream / eval" in out
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder, "step")]


@pytest.mark.soak
def test_one_rank_reads_the_same_rows_as_two(on_two_ranks: Path, tmp_path: Path) -> None:
    docs = f"data.path={on_two_ranks / 'docs'}"
    single = ["algorithm=single", "data.prefetch_steps=0"]
    code, _, err = train(tmp_path, *STREAM, docs, *single)
    assert code == 0, err
    assert losses(tmp_path) == pytest.approx(losses(on_two_ranks), abs=1e-12)
    assert len(set(losses(tmp_path))) == STEPS


def test_a_run_goes_on_in_the_middle_of_the_stream(on_two_ranks: Path, tmp_path: Path) -> None:
    shutil.copytree(on_two_ranks / "outputs", tmp_path / "outputs", symlinks=True)
    checkpoints = tmp_path / "outputs" / "latest" / "checkpoints"
    for folder in checkpoints.iterdir():
        if int(folder.name.removeprefix("step-")) > 14:
            shutil.rmtree(folder)
    manifest = json.loads((checkpoints / "step-00000014" / "manifest.json").read_text())
    bookmark = manifest["state"]["driver"]["stream"]
    assert 0 < bookmark["row"] <= 14 * 8
    assert bookmark["pass"] > 0
    code, out, err = train(tmp_path, "checkpoint.resume=latest")
    assert code == 0, err
    assert "resuming after step 14" in out
    assert losses(tmp_path) == losses(on_two_ranks)
    assert_same(state_of(on_two_ranks), state_of(tmp_path))


@pytest.mark.soak
def test_a_stream_that_breaks_midway_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    write_documents(tmp_path / "docs")
    with (tmp_path / "docs" / "1.jsonl").open("a") as file:
        file.write("{no json at all\n")
    docs = f"data.path={tmp_path / 'docs'}"
    code, _, err = train(tmp_path, *STREAM, docs, "training.steps=100000")
    assert code == 3
    assert f"the driver cannot read the stream any more: {docs} cannot be read on from" in err
    told = summary(tmp_path)
    assert (told["status"], told["failed_rank"]) == ("failed", None)
    assert "cannot read the stream" in told["reason"]
    assert len(losses(tmp_path)) > 3
