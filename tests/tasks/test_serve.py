"""task=serve as a user runs it: real processes, an answer over HTTP, and every kind of end."""

from __future__ import annotations

import itertools
import json
import platform
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from smolrun.cli.compose import compose
from smolrun.cli.run import drive
from smolrun.data.chat_template import TEMPLATE_FILE
from smolrun.driver.serving import ServingRun
from smolrun.driver.serving_model import example
from smolrun.errors import ConfigError, HostError
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.serving.messages import Ready
from smolrun.serving.source import source_of_folder
from smolrun.tracking.drivers import living_drivers
from smolrun.tracking.past_runs import state_of
from smolrun.tracking.run_folder import RunFolder
from tests.tasks.served import LONG, START_S, Server, events, model_in, serving
from tests.tasks.test_whole_runs import finish, is_alive, start
from tests.waiting import until

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("models") / "tiny")


def choice(model: Path) -> list[str]:
    return ["model=hf", f"model.name={model}", "serving.port=0", "cluster.threads=1"]


def test_it_answers_says_where_and_drains(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, *choice(model)) as server:
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert server.url.startswith("http://127.0.0.1:")
        assert state_of(RunFolder(server.run)) == "serving"
        asked = server.body(temperature=0, max_tokens=8)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert len(server.workers) == 1  # auto: one machine holds it
        with server.stream(max_tokens=2000) as lines:
            got = events(lines)
            next(got)
            server.driver.send_signal(signal.SIGTERM)
            rest = list(got)  # to its end, though the server is being stopped
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        code, out, err = server.end()
        assert (code, err) == (130, "")
        assert f"curl {server.url}/v1/chat/completions" in out
        told = server.summary()
        assert (told["status"], told["reason"]) == ("stopped", "stopped by the user")
        until(server.is_gone)
        assert not (tmp_path / "outputs" / "latest").exists()


def test_a_detached_server_is_seen_unloads_and_is_stopped_by_the_commands_for_runs(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["detach=true", "serving.unload_after_min=0.02"]
    code, out, err = finish(start(tmp_path, "task=serve", *choice(model), *asked))
    assert code == 0, err
    run_id = out.split(" runs in the background")[0]
    assert "-serve-tiny-" in run_id
    (url,) = re.findall(r"tiny is loaded, then served at (http://127.0.0.1:\d+)\n", err)
    folder = RunFolder(tmp_path / "outputs" / run_id)
    driver = psutil.Process(folder.driver()["pid"])
    monkeypatch.chdir(tmp_path)
    try:
        until(lambda: state_of(folder) == "serving", START_S)
        processes = [driver, *driver.children(recursive=True)]
        (known,) = [one for one in living_drivers() if one.folder == str(folder.path)]
        assert known.needs(model)  # task=clean keeps it
        body = {"prompt": "Once", "temperature": 0, "max_tokens": 8}
        before = httpx.post(f"{url}/v1/completions", json=body, timeout=START_S).json()["choices"]
        until(lambda: httpx.get(f"{url}/readyz").json()["status"] == "unloaded", START_S)
        until(lambda: not driver.children(), START_S)  # which gives all their memory back
        body["stream"] = True
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=START_S) as response:
            lines = list(response.iter_lines())
        assert lines[0].startswith(": loading the model")
        after = [event["choices"][0] for event in events(iter(lines))]
        assert "".join(one["text"] for one in after) == before[0]["text"]
        processes += driver.children(recursive=True)
        assert drive(compose(["task=status"])) == 0
        assert f"{run_id}  serving at {url}" in capsys.readouterr().out
        assert drive(compose(["task=stop"])) == 0  # the only one that is alive
        assert "stop requested, once running answers have ended" in capsys.readouterr().out
        until(lambda: not any(map(is_alive, processes)))
    finally:
        with suppress(psutil.NoSuchProcess):
            driver.kill()
    assert not [one for one in living_drivers() if one.folder == str(folder.path)]
    assert drive(compose(["task=attach", f"attach.run={run_id}"])) == 130
    assert "stopped (stopped by the user): served for" in capsys.readouterr().out


@pytest.mark.soak  # its parts: test_runs.py, tests/cli/test_run.py
def test_two_servers_on_one_machine_are_told_apart(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, *choice(model)) as first:
        port = first.url.rpartition(":")[2]
        asked = [*choice(model), f"serving.port={port}"]
        code, _, err = finish(start(tmp_path, "task=serve", *asked), START_S)
        assert code == 2 and f"serving.port = {port}: cannot listen on 127.0.0.1" in err
        assert len(list((tmp_path / "outputs").glob("2*"))) == 1
        with serving(tmp_path, *choice(model)) as second:
            monkeypatch.chdir(tmp_path)
            assert drive(compose(["task=status"])) == 0
            listed = capsys.readouterr().out
            for server in (first, second):
                assert f"{server.run.name}  serving at {server.url}" in listed
            assert drive(compose(["task=stop"])) == 2  # not a terminal, so nobody can be asked
            refused = capsys.readouterr().err
            assert first.run.name in refused and second.run.name in refused
            assert drive(compose(["task=stop", f"stop.run={first.run.name}"])) == 0
            until(first.is_gone)
            assert httpx.get(f"{second.url}/readyz").status_code == 200
            assert drive(compose(["task=stop"])) == 0
            until(second.is_gone)


def stage_rows(url: str) -> list[dict[str, Any]]:
    """The figures of every stage on /metrics, in order of ranks."""
    rows: dict[str, dict[str, Any]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("smolrun_stage_") and sample.labels:
                name = sample.name.removeprefix("smolrun_stage_").removesuffix("_total")
                row = rows.setdefault(sample.labels["rank"], dict(sample.labels))
                row[name] = sample.value
    return [rows[rank] for rank in sorted(rows)]


def is_at_rest(url: str) -> bool:
    """Whether rank 0 runs nothing and has given back every slot."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {"smolrun_requests_running 0.0", "smolrun_cache_usage_ratio 0.0"} <= {*lines}


@pytest.mark.soak  # tests/serving/test_engine.py and tests/launch/test_elastic_driver.py have parts
@pytest.mark.timeout(600)
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_answers_go_on_over_the_stages_that_are_left_and_with_the_one_that_is_back(
    tmp_path: Path, model: Path, signal_name: str
) -> None:
    if not hasattr(signal, signal_name):
        pytest.skip(f"this system has no {signal_name}")
    pipeline = ["serving=pipeline", "serving.layers=[[0,0],[1,2],[3,3]]", "cluster.ranks=3"]
    # A draw for every place, so that a wrong token changes all that follow.
    drawn = {"temperature": 1.0, "seed": 5, "max_tokens": 400}
    with serving(tmp_path, *choice(model), *pipeline, "mesh.liveness=fast") as server:
        rows = stage_rows(server.url)
        assert [row["stage"] for row in rows] == ["0-0", "1-2", "3-3"]
        held = [(row["weight_bytes"], row["cache_bytes"]) for row in rows]
        told = server.summary()
        assert [(one["weight_bytes"], one["cache_bytes"]) for one in told["stages"]] == held
        assert [one["layers"] for one in told["stages"]] == [[0, 0], [1, 2], [3, 3]]
        assert max(weights for weights, _ in held) < told["model_bytes"] <= sum(w for w, _ in held)
        with server.stream() as lines:
            next(events(lines))
        until(lambda: is_at_rest(server.url))  # the client has left, and no stage goes on
        with suppress(httpx.ReadTimeout):
            asked = server.body(**LONG | {"stream": False})
            httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=1.0)
        until(lambda: is_at_rest(server.url))
        with server.stream(**drawn) as lines:
            undisturbed = text_of(events(lines))
        assert len(undisturbed) > 100
        for rank in (1, 2):
            assert lose(server, rank, signal_name, drawn) == undisturbed
        with server.stream(**drawn) as lines:
            got = events(lines)
            next(got)
            server.worker(0).send_signal(signal.SIGKILL)
            rest = list(got)
        assert "rank 0" in rest[-1]["error"]["message"], rest[-1]
        code, out, err = server.end()
        assert code == 3
        assert re.search(
            r"pipeline: rank 0 \(local\) layers 0 to 0, \d+ MB of weights and \d+ MB of cache; "
            r"rank 1 .*; the whole model has \d+ MB of weights\n",
            out,
        )
        assert "rank 0" in err and "local" in err
        told = server.summary()
        assert (told["status"], told["failed_rank"]) == ("failed", 0)
        until(server.is_gone)


def lose(server: Server, rank: int, signal_name: str, drawn: dict[str, Any]) -> str:
    """The text of an answer in whose middle a rank is lost; then that rank is back."""
    survivors = {other: server.worker(other).pid for other in {0, 1, 2} - {rank}}
    comments: list[str] = []
    with server.stream(**drawn) as lines:
        got = events(noted(lines, comments))
        begun = [next(got) for _ in range(40)]
        server.worker(rank).send_signal(getattr(signal, signal_name))
        text = text_of(iter([*begun, *got]))
    assert any(line.startswith(": recovering") for line in comments)
    until(lambda: len(stage_rows(server.url)) == 3, START_S)
    until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200, START_S)
    assert {other: server.worker(other).pid for other in survivors} == survivors
    return text


def text_of(got: Iterator[dict[str, Any]]) -> str:
    choices = [choice for event in got for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def noted(lines: Iterator[str], comments: list[str]) -> Iterator[str]:
    """The lines, with the comments kept."""
    for line in lines:
        if line.startswith(":"):
            comments.append(line)
        yield line


def rank_up(url: str) -> dict[str, float]:
    """Which ranks take requests, by /metrics."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["rank"]: s.value for s in samples if s.name == "smolrun_rank_up"}


def test_a_killed_replica_s_answer_goes_on_at_another_with_the_same_text(
    tmp_path: Path, model: Path
) -> None:
    asked = {"temperature": 1.0, "seed": 7, "max_tokens": 400, "logit_bias": LONG["logit_bias"]}
    with serving(tmp_path, *choice(model), "serving=replicas", "cluster.ranks=2") as server:
        until(lambda: rank_up(server.url) == {"0": 1.0, "1": 1.0}, START_S)
        chat = f"{server.url}/v1/chat/completions"
        answers = [
            httpx.post(chat, json=server.body(**asked, worker_rank=rank), timeout=60)
            for rank in (0, 1)
        ]
        assert [answer.headers["x-smolrun-rank"] for answer in answers] == ["0", "1"]
        assert all(row["tokens"] > 0 for row in stage_rows(server.url))
        text, other = (one.json()["choices"][0]["message"]["content"] for one in answers)
        assert text == other
        refused = httpx.post(chat, json=server.body(worker_rank=2))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "worker_rank")
        with server.stream(**asked, worker_rank=1) as lines:
            kept: list[str] = []
            got = events(noted(lines, kept))
            told = text_of(itertools.islice(got, 20))
            server.worker(1).kill()
            told += text_of(got)
        assert ": recovering rank 1 is lost, rank 0 continues" in kept
        assert told == text
        until(lambda: rank_up(server.url) == {"0": 1.0, "1": 1.0}, START_S)  # a new process
        again = httpx.post(chat, json=server.body(**asked, worker_rank=1), timeout=60)
        assert again.json()["choices"][0]["message"]["content"] == text
        server.driver.send_signal(signal.SIGTERM)
        code, out, err = server.end()
        assert (code, err) == (130, "")
        assert "rank 1 on local answers requests" in out
        assert [one["rank"] for one in server.summary()["stages"]] == [0, 1]


def test_a_killed_driver_leaves_nobody_and_its_port_was_its_own(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path, *choice(model)) as server:
        port = server.url.rpartition(":")[2]
        taken = compose(["task=serve", *choice(model), f"serving.port={port}"])
        assert drive(taken) == 2
        assert f"serving.port = {port}: " in (said := capsys.readouterr().err)
        assert f"process {server.driver.pid}" in said
        server.driver.kill()
        until(server.is_gone)
        assert state_of(RunFolder(server.run)) == "died"


def refused(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: Any, *overrides: str) -> str:
    """What is said of a server that cannot be; nothing may have been started."""
    monkeypatch.chdir(folder)
    assert drive(compose(["task=serve", *overrides])) == 2
    assert not (folder / "outputs").exists()
    return str(capsys.readouterr().err)


def test_a_model_without_one_of_its_files_is_refused(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(model, tmp_path / "models" / "broken")
    (broken / "model.safetensors").unlink()
    said = refused(monkeypatch, tmp_path, capsys, *choice(broken))
    assert "broken" in said and "safetensors" in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[256]", "generation_config.json is not a JSON object"),
        ("{", "generation_config.json cannot be read"),
        ('{"eos_token_id": ["</s>"]}', "eos_token_id = ['</s>'] is not an id of a token"),
        (
            '{"do_sample": true, "top_k": "all"}',
            "generation_config.json: Expected `int`, got `str`",
        ),
    ],
)
def test_a_damaged_generation_config_is_named(
    tmp_path: Path,
    model: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    sentence: str,
) -> None:
    broken = shutil.copytree(model, tmp_path / "models" / "broken")
    (broken / "generation_config.json").write_text(content)
    assert sentence in refused(monkeypatch, tmp_path, capsys, *choice(broken))


def test_a_full_disk_ends_no_server(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(run: ServingRun, folder: RunFolder, *, on_ready: Any, **_: object) -> RunOutcome:
        shutil.rmtree(folder.path)
        on_ready(Ready(64, 512, 8))
        return RunOutcome("stopped", 130)

    monkeypatch.setattr(ServingRun, "serve", serve)
    monkeypatch.chdir(tmp_path)
    assert drive(compose(["task=serve", *choice(model)])) == 130
    said = capsys.readouterr().out
    assert "warning: summary.json cannot be written: " in said
    assert " is served at http://127.0.0.1:" in said


def test_a_host_that_cannot_be_equipped_is_in_the_summary(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_on_ranks(*_: object, **__: object) -> None:
        raise HostError("mini2", "its disk is full")

    monkeypatch.setattr("smolrun.driver.serving.run_on_ranks", run_on_ranks)
    monkeypatch.chdir(tmp_path)
    assert drive(compose(["task=serve", *choice(model)])) == 3
    assert "smolrun: mini2: its disk is full" in capsys.readouterr().err
    (run,) = (tmp_path / "outputs").glob("2*")
    assert state_of(RunFolder(run)) == "failed"
    assert RunFolder(run).summary()["failed_host"] == "mini2"


def test_what_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = ["serving.slots=1024", "serving.context=8192"]
    monkeypatch.setattr("smolrun.driver.serving.machine_memory", memory_of(1 << 30))
    said = refused(monkeypatch, tmp_path, capsys, *choice(model), *huge)
    assert "model=tiny does not fit: it needs" in said
    assert "a smaller serving.context or serving.slots" in said


def memory_of(available: int) -> Any:
    from smolrun.launch.machine_memory import MachineMemory

    return lambda: MachineMemory(available, available, 0)


def test_wrong_layers_are_refused(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ["serving=pipeline", "serving.layers=[[0,1],[2,9]]"]
    said = refused(monkeypatch, tmp_path, capsys, *choice(model), *wrong)
    assert "serving.layers: the stages end with layer 9, but the model has layers 0 to 3" in said


def test_a_dry_run_prints_the_cut_and_starts_nothing(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["task=serve", "training.dry_run=true", "model=qwen3_14b", "cluster=macmini3"]
    asked += ["cluster.memory_gb=16"]
    assert drive(compose(asked)) == 0
    said = capsys.readouterr().out
    assert said.startswith("Qwen/Qwen3-14B: 27.5 GB of weights as bf16\n")
    assert "mini3" in said and "39 " in said and "tokens/s" in said
    assert re.search(r"\n *all +27\.5 GB +\d", said)
    assert drive(compose([*asked, "model=qwen3_32b", "serving.weights=bf16"])) == 2
    assert "does not fit: it needs 61.0 GB" in capsys.readouterr().out
    assert drive(compose([*asked, "model=qwen3_32b"])) == 0
    assert "of weights as int8" in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists()


def test_a_bind_beyond_this_machine_makes_a_key_that_is_needed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolrun.driver import serving as driver
    from smolrun.tracking import api_key as keys

    monkeypatch.setattr(keys.platformdirs, "user_config_path", lambda _: tmp_path / "config")
    said: list[str] = []
    key = driver.needed_key(said.append, is_terminal=True)
    path = tmp_path / "config" / "serving.key"
    assert path.stat().st_mode & 0o077 == 0
    assert key in said[0] and len(key) > 40
    assert driver.needed_key(said.append, is_terminal=True) == key
    assert key not in said[1] and str(path) in said[1]
    path.unlink()
    key = driver.needed_key(said.append, is_terminal=False)  # detached, all of it is in a log
    assert path.read_text() == key
    assert key not in said[2] and str(path) in said[2]
    path.write_text("")
    with pytest.raises(ConfigError, match="is empty; delete it"):
        driver.needed_key(said.append, is_terminal=True)
    path.write_text(key)
    config = compose(["task=serve", *choice(model), "serving.bind=0.0.0.0"])
    with driver.ServingRun(config, lambda _: None, lambda *_: None) as run:
        name, _, port = run.url.removeprefix("http://").rpartition(":")
        assert name == platform.node()  # 0.0.0.0 is no address to ask
        place = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(place).status_code == 401
        assert httpx.get(place, headers={"authorization": f"Bearer {key}"}).status_code == 200
        line = example(run.source, run.url, needs_key=run.is_open)
        assert "-H 'Authorization: Bearer KEY'" in line and key not in line


def test_the_first_request_is_a_question_or_a_text_that_goes_on(tmp_path: Path) -> None:
    source = source_of_folder(model_in(tmp_path / "it's"), "it's")
    *_, body = shlex.split(example(source, "http://here", needs_key=False))
    assert json.loads(body) == {"model": "it's", "messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "it's" / TEMPLATE_FILE).unlink()
    line = example(source, "http://here", needs_key=False)
    assert line.startswith("curl http://here/v1/completions ")
    assert json.loads(shlex.split(line)[-1])["prompt"] == "Once upon a time"


def test_an_address_that_is_not_here_is_named(
    tmp_path: Path, model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolrun.tracking import api_key as keys

    monkeypatch.setattr(keys.platformdirs, "user_config_path", lambda _: tmp_path / "config")
    said = refused(monkeypatch, tmp_path, capsys, *choice(model), "serving.bind=::2")
    assert "serving.bind = ::2: cannot listen on ::2 port 0" in said and "end that" not in said
