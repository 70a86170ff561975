"""task=generate: one answer on stdout, everything else elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from smolrun.driver.serving_client import prompt_or_refuse
from smolrun.errors import ConfigError
from smolrun.serving.text import Prompts
from tests.tasks.served import model_in
from tests.tasks.test_whole_runs import is_alive
from tests.waiting import until

PROMPT = "a, b (c) 'd' ${e} \n"


def generate(folder: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smolrun.cli", "task=generate", *words]
    return subprocess.run(
        command, cwd=folder, input=stdin, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.timeout(220)
@pytest.mark.parametrize(
    ("serving", "is_typed"),
    [("pipeline", True), pytest.param("auto", False, marks=pytest.mark.soak)],
)
def test_it_writes_what_transformers_writes_and_nothing_else(
    tmp_path: Path, serving: str, is_typed: bool
) -> None:
    model = model_in(tmp_path / "model")
    words = ["model=hf", f"model.name={model}", "serving.temperature=0", "serving.max_tokens=24"]
    words += ["cluster.threads=1", f"serving={serving}"]
    prompts = Prompts(model)
    ids, _ = prompts.chat([{"role": "user", "content": PROMPT}], {})
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        made = network.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    answer = made[0, len(ids) :].tolist()
    answer = answer[: answer.index(256)] if 256 in answer else answer
    expected = b"".join(prompts.token_bytes[id] for id in answer).decode("utf-8", "replace")
    words += [f"prompt={PROMPT}"] if is_typed else []
    done = generate(tmp_path, *words, stdin="" if is_typed else PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\r\n", "\n") == expected.replace("\r", "\n") + "\n"
    assert "loading the model" in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without telling it")
@pytest.mark.soak
@pytest.mark.timeout(220)
def test_a_signal_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    model, place = model_in(tmp_path / "model"), tmp_path / "temporary"
    place.mkdir()
    words = ["model=hf", f"model.name={model}", "serving.max_tokens=8000", "cluster.threads=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "smolrun.cli", "task=generate", "prompt=Talk", *words],
        env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None and process.stdout.read(1)
        (worker,) = psutil.Process(process.pid).children()
        assert os.listdir(place)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert b"Traceback" not in said
    assert os.listdir(place) == []
    until(lambda: not is_alive(worker))


def test_without_a_prompt_it_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r'generate.prompt is missing: prompt="..."'):
        prompt_or_refuse(None, lambda: "", is_terminal=True)
    with pytest.raises(ConfigError, match="empty"):
        prompt_or_refuse(None, lambda: "", is_terminal=False)
    for read in (lambda: "\udcff", lambda: b"\xff".decode()):
        with pytest.raises(ConfigError, match="is not UTF-8"):
            prompt_or_refuse(None, read, is_terminal=False)
    assert prompt_or_refuse("a, b", lambda: "unused", is_terminal=False) == "a, b"
    assert prompt_or_refuse(None, lambda: "read\n", is_terminal=False) == "read\n"
