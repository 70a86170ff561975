"""algorithm=mp and mp_pipeline as a user starts them: real processes, of which one dies, freezes,
is slow, has a slow link or too little memory; other algorithms before and after; export."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from smolrun.checkpoints.find import newest_valid
from smolrun.checkpoints.reader import CheckpointReader
from tests.launch.test_machine_memory import limited_group
from tests.tasks.background import process_of
from tests.tasks.test_fsdp_runs import losses
from tests.tasks.test_resume import RUN, assert_same, state_of, steps_told, train
from tests.tasks.test_whole_runs import SMALL, finish, start, summary
from tests.waiting import SOON_S, until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

STAGES = ["algorithm=mp_pipeline", "cluster.ranks=3", "model.layers=3"]
SMOLRUN = [sys.executable, "-m", "smolrun.cli"]
ENDLESS = ["training.steps=100000", "training.eval_every=0", "training.sample_tokens=0"]


def ended_by(
    folder: Path, harm: Callable[[psutil.Process], object], *keys: str
) -> tuple[float, str]:
    """A run of three stages of which the middle one is harmed: seconds until the run has ended, and
    its last words."""
    run = start(folder, *SMALL, *STAGES, *ENDLESS, *keys)
    try:
        until(lambda: steps_told(folder) > 3, 100)
        middle = process_of(1, folder / "outputs" / "latest")
        began = time.monotonic()
        harm(middle)
        code, _, err = finish(run)
    finally:
        run.kill()
    assert code == 3, err
    assert summary(folder)["failed_rank"] == 1
    return time.monotonic() - began, err


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_killed_stage_is_named(tmp_path: Path, schedule: str) -> None:
    seconds, said = ended_by(tmp_path, psutil.Process.kill, f"algorithm.schedule={schedule}")
    print(f"{schedule}: {seconds:.1f} s")
    assert "rank 1" in said and "died from signal 9" in said
    assert seconds < SOON_S


def test_a_frozen_stage_is_named(tmp_path: Path) -> None:
    seconds, said = ended_by(
        tmp_path, lambda one: one.send_signal(signal.SIGSTOP), "mesh.liveness=fast"
    )
    print(f"{seconds:.1f} s: {said}")
    assert "rank 1" in said and "silent for 3." in said
    assert seconds < SOON_S  # of which 3 s are the silence


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize(
    ("algorithm", "quantization"),
    [("mp", "none"), ("mp_pipeline", "none"), ("mp_pipeline", "int8")],
)
def test_after_the_loss_of_a_stage_a_run_goes_on_to_the_same_bytes(
    tmp_path: Path, algorithm: str, quantization: str, staleness: int
) -> None:
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    keys = [*RUN, f"algorithm={algorithm}", *STAGES[1:], f"quantization={quantization}"]
    keys += [f"staleness.bound={staleness}"]
    for folder in (whole, hurt):
        folder.mkdir()
    assert train(whole, *keys)[0] == 0
    run = start(hurt, *keys)
    until(lambda: steps_told(hurt) >= 7 or run.poll() is not None, 100)
    process_of(2, hurt / "outputs" / "latest").kill()
    assert finish(run)[0] == 3
    code, _, err = train(hurt, "checkpoint.resume=latest")
    assert code == 0, err
    assert_same(state_of(whole), state_of(hurt))


def verdict(folder: Path, *middle: str) -> dict[str, float]:
    """Where the time went in a run whose middle stage is emulated with these keys."""
    hosts = ["{name: a}", f"{{name: b, emulate: {{{', '.join(middle)}}}}}", "{name: c}"]
    text = ["# Three stages", "name: three", "hosts:", *(f"  - {host}" for host in hosts), ""]
    (folder / "conf" / "cluster").mkdir(parents=True)
    (folder / "conf" / "cluster" / "three.yaml").write_text("\n".join(text))
    model = ["data.max_mb=1", "model.layers=3", "model.width=128", "data.sequence_length=64"]
    keys = ["algorithm=mp_pipeline", "cluster=three", "cluster.threads=1", *model]
    keys += ["training.steps=12", "training.eval_every=0", "training.sample_tokens=0"]
    code, out, err = finish(start(folder, *keys, "training.global_batch_size=24"), 300)
    assert code == 0, err
    print([line for line in out.splitlines() if line.startswith("where the time went")])
    found: dict[str, float] = summary(folder)["time"]
    return found


def test_a_stage_that_is_8_times_slower_is_named(tmp_path: Path) -> None:
    found = verdict(tmp_path, "compute: 0.125")
    assert found["slow_rank"] == 1 and found["slow_factor"] > 4
    assert found["waiting_for_slower_ranks"] > max(found["network"], found["pipeline_bubble"])


def test_a_link_of_25_mbit_is_named(tmp_path: Path) -> None:
    found = verdict(tmp_path, "bandwidth_mbps: 25")
    assert found["network"] > max(found["waiting_for_slower_ranks"], found["pipeline_bubble"])


def test_a_stage_without_memory_is_named_with_remedies(tmp_path: Path) -> None:
    """Logits of a whole batch need 0.4 GB several times over, on the last stage only."""
    keys = ["data.max_mb=1", "data.sequence_length=256", "training.global_batch_size=96", *STAGES]
    into = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"']
    with limited_group(2 << 30) as group:
        run = subprocess.run(
            [*into, str(group), *SMOLRUN, *keys, *ENDLESS, "algorithm.micro_batches=1"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    print(run.stderr)
    assert run.returncode == 3, run.stderr
    assert summary(tmp_path)["failed_rank"] == 2
    assert "rank 2 on local may have run out of memory" in run.stderr
    assert run.stderr.count("(saves about ") == 2


@pytest.mark.parametrize(("algorithm", "is_tied"), [("mp", True), ("mp_pipeline", False)])
def test_fsdp_then_stages_then_transformers_have_equal_logits(
    tmp_path: Path, algorithm: str, is_tied: bool
) -> None:
    """A run goes on from 4 shards as 3 stages; what is exported answers as the stages' parameters
    do in our own model; then two replicas go on from the stages."""
    keys = [*SMALL, "model.layers=3", "training.eval_batches=2", "training.sample_tokens=0"]
    keys += ["training.warmup_steps=2", "training.lr_schedule=constant"]
    keys += [f"model.tie_embeddings={str(is_tied).lower()}"]
    fsdp, stages = ["algorithm=fsdp", "cluster.ranks=4"], [f"algorithm={algorithm}", *STAGES[1:2]]
    plain = tmp_path / "plain"
    plain.mkdir()
    expected = losses(plain, [*keys, "algorithm=single", "training.steps=8"])
    found = losses(
        tmp_path,
        [*keys, *fsdp, "training.steps=4"],
        ["checkpoint.resume=latest", "training.steps=8", *stages],
    )
    assert found == pytest.approx(expected, abs=1e-5)
    folder = exported(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(exported(plain))
    tokens = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        difference = model(tokens).logits - reference(tokens).logits
    print(f"{algorithm}: logits differ by {difference.abs().max():.1e}")
    assert difference.abs().max() < 1e-5
    newest = newest_valid(tmp_path / "outputs" / "latest" / "checkpoints", pytest.fail)
    assert newest is not None
    with CheckpointReader(newest) as checkpoint:
        saved = checkpoint.read("model/token_embedding.weight")
    assert torch.equal(model.get_input_embeddings().weight.detach(), saved)
    on = ["checkpoint.resume=latest", "training.steps=10"]
    found = losses(tmp_path, [*on, "algorithm=classicdp", "cluster.ranks=2"])
    assert found == pytest.approx(losses(plain, on), abs=1e-5)
    assert summary(tmp_path)["final_eval_loss"] == pytest.approx(
        summary(plain)["final_eval_loss"], abs=1e-5
    )


def exported(folder: Path) -> Path:
    """The folder for transformers of the latest run there."""
    code, out, err = finish(start(folder, "task=export"))
    assert code == 0, out + err
    (found,) = (folder / "outputs" / "latest").resolve().glob("huggingface-*")
    return found


@pytest.mark.timeout(1800)
def test_smollm2_is_fine_tuned_in_two_stages_and_answers(tmp_path: Path) -> None:
    question, answer = "What is the secret word?", "The secret word is zebra."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    lines = [json.dumps({"messages": turns})] * 40
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    keys = ["model=smollm2_135m", "data=chat", "data.path=chats.jsonl", "data.sequence_length=64"]
    keys += ["algorithm=mp_pipeline", "cluster.ranks=2", "cluster.threads=1", "optimizer.lr=1e-4"]
    keys += ["training.steps=20", "training.global_batch_size=4", "training.warmup_steps=2"]
    keys += ["training.sample_tokens=0", "training.eval_every=0", "training.eval_batches=1"]
    code, out, err = finish(start(tmp_path, *keys), 1500)
    assert code == 0, out + err
    print(re.findall(r"layers of the ranks.*", out), summary(tmp_path)["final_train_loss"])
    folder = exported(tmp_path)
    words = ["task=generate", "cluster.threads=1", "serving.temperature=0", "serving.max_tokens=12"]
    for model in (["model.run=latest"], ["model=hf", f"model.name={folder}"]):
        said = subprocess.run(
            [*SMOLRUN, *words, *model],
            cwd=tmp_path, input=question, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert "zebra" in said.stdout
