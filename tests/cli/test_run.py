"""From the command line to the task: what it gets, what its errors become, whose conf/ counts."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import msgspec
import platformdirs
import pytest

from smolrun import cli
from smolrun.cli.arguments import without_aliases
from smolrun.cli.compose import compose
from smolrun.cli.run import run as run_command
from smolrun.config import RunConfig, redacted
from smolrun.errors import ConfigError, DataError, PeerLost
from smolrun.tracking.run_folder import RunFolder

Run = Callable[..., int]


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that a stand-in for tasks/train.py was given."""
    configs: list[RunConfig] = []
    stand_in = types.ModuleType("smolrun.tasks.train")
    stand_in.drive = lambda config: configs.append(config) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smolrun.tasks.train", stand_in)
    return configs


@pytest.fixture
def run(driven: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Types `smolrun ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def typed(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["smolrun", *arguments])
        return cli.main()

    return typed


def test_the_task_gets_the_checked_configuration(run: Run, driven: list[RunConfig], tmp_path: Path):
    assert run("training.steps=7", "cluster.ranks=3", "run_name=first") == 0
    (config,) = driven
    assert (config.task, config.training.steps, config.cluster.ranks) == ("train", 7, 3)
    assert config.run_name == "first"
    assert list(tmp_path.iterdir()) == []


def test_its_exit_code_is_ours(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["smolrun.tasks.train"], "drive", lambda config: 3)
    assert run() == 3


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("no folder /nowhere"), 2, "no folder /nowhere"),
        (ConfigError(["one", "two"]), 2, "2 problems"),
        (PeerLost(1, 0, "killed"), 3, "lost rank 1: killed"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_its_errors_are_sentences(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    words: str,
):
    def drive(config: RunConfig) -> int:
        raise error

    monkeypatch.setattr(sys.modules["smolrun.tasks.train"], "drive", drive)
    assert run() == code
    assert words in capsys.readouterr().err


def test_ones_own_conf_comes_first(run: Run, driven: list[RunConfig], tmp_path: Path):
    for group in ("cluster", "training"):
        (tmp_path / "conf" / group).mkdir(parents=True)
    home = "# Mine\nname: home\nhosts: [{name: desk, ranks: 2}, {name: shelf}]\n"
    (tmp_path / "conf" / "cluster" / "home.yaml").write_text(home)
    own = "# Mine\ndefaults: [quick, _self_]\nsteps: 11\n"
    (tmp_path / "conf" / "training" / "default.yaml").write_text(own)
    text = (Path(cli.__file__).parents[2] / "conf" / "training" / "default.yaml").read_text()
    (tmp_path / "conf" / "training" / "quick.yaml").write_text(text)
    assert run("cluster=home", "cluster.start_timeout_s=9") == 0
    (config,) = driven
    assert config.training.steps == 11
    assert [host.name for host in config.cluster.hosts or []] == ["desk", "shelf"]
    assert config.cluster.start_timeout_s == 9


def test_another_config_dir_adds_choices(run: Run, driven: list[RunConfig], tmp_path: Path):
    (tmp_path / "more" / "training").mkdir(parents=True)
    text = "# Mine\ndefaults: [default, _self_]\nsteps: 13\n"
    (tmp_path / "more" / "training" / "mine.yaml").write_text(text)
    assert run("--config-dir", "more", "training=mine") == 0
    assert driven[0].training.steps == 13
    assert run("training=mine") == 2


def test_the_folder_of_another_hydra_program_is_pointed_out(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("defaults: [net: big]\n")
    assert run() == 2
    assert "conf/config.yaml is read instead of smolrun's own" in capsys.readouterr().err


def test_ones_own_code_is_found_beside_oneself(run: Run, driven: list[RunConfig], tmp_path: Path):
    (tmp_path / "my_code_of_a_test.py").write_text("def build(spec, *, size): ...\n")
    assert run("model.target=my_code_of_a_test:build", "model.size=5") == 0
    model = driven[0].model
    assert (model.name, model.keywords()) == ("my_code_of_a_test", {"size": 5})
    assert sys.path[-1] == str(tmp_path)


def test_a_file_without_a_target_gives_its_keys_to_the_one_typed(
    run: Run, driven: list[RunConfig], tmp_path: Path
):
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# Mine\nname: mine\ntarget: ???\nwidth: 3\n")
    assert run("model=mine", "model.target=json:loads", "model.depth=5") == 0
    assert driven[0].model.keywords() == {"width": 3, "depth": 5}


def test_values_may_be_given_where_the_files_have_none(run: Run, driven: list[RunConfig]):
    assert run("cluster.workdir=there", "+cluster.python=/usr/bin/python3") == 0
    assert driven[0].cluster.workdir == "there"
    assert driven[0].cluster.python == "/usr/bin/python3"


def test_interpolations_are_resolved_once(run: Run, driven: list[RunConfig]):
    assert run("run_name=${model.name}-${seed}", "seed=5") == 0
    assert driven[0].run_name == "gpt_tiny-5"


def test_an_experiment_sets_many_things(run: Run, driven: list[RunConfig]):
    assert run("experiment=late_gradients", "cluster.ranks=2") == 0  # its earlier name
    assert driven[0].staleness.bound == 2
    assert driven[0].cluster.ranks == 2


def test_a_worker_never_meets_hydra(run: Run, monkeypatch: pytest.MonkeyPatch):
    worker = types.ModuleType("smolrun.worker.process")
    worker.main = lambda: 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smolrun.worker.process", worker)
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert run("--worker") == 5


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("~/x.txt", "/home/a b/x.txt"),
        ("[~/x,~/y]", ["/home/a b/x", "/home/a b/y"]),
        ("'~/x'", "~/x"),
    ],
)
def test_a_tilde_is_the_home_folder(
    run: Run, driven: list[RunConfig], monkeypatch: pytest.MonkeyPatch, typed: str, path: object
):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/a b"))
    assert run("data=text", f"data.path={typed}") == 0
    assert driven[0].data.keywords()["path"] == path


def write_home(folder: Path, ssh: str = "me@pi1", url: str = "https://me:secret@index/x") -> None:
    """conf/cluster/home.yaml, with a password in a URL, and without a `name:`."""
    file = folder / "conf" / "cluster" / "home.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    env = f"env: {{PIP_INDEX_URL: '{url}'}}"
    file.write_text(f"# Mine\nhosts: [{{name: pi1, ssh: {ssh}, {env}}}]\n")


def test_a_cluster_is_called_as_it_was_chosen(run: Run, driven: list[RunConfig], tmp_path: Path):
    write_home(tmp_path)
    for choice in ("home", "sim/pi3", "local"):
        assert run(f"cluster={choice}") == 0
    assert run("cluster=home", "cluster.name=mine") == 0
    assert [config.cluster.name for config in driven] == ["home", "sim/pi3", "local", "mine"]


def test_a_resumed_run_has_its_passwords_from_the_cluster_file(
    run: Run,
    driven: list[RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / "config" / name)
    write_home(tmp_path)
    assert run("cluster=home") == 0
    folder = tmp_path / "outputs" / "20260131-142501-x-aaaa"
    folder.mkdir(parents=True)
    text = msgspec.yaml.encode(redacted(driven[0])).decode()
    RunFolder(folder).write_config(text)
    assert "secret" not in text
    assert "https://***@index/x" in text
    resume = f"checkpoint.resume={folder.name}"

    def env() -> dict[str, str]:
        return (driven[-1].cluster.hosts or [])[0].env

    assert run(resume) == 0
    assert env() == {"PIP_INDEX_URL": "https://me:secret@index/x"}
    write_home(tmp_path, url="https://me:changed@index/x")
    assert run(resume) == 0
    assert env() == {"PIP_INDEX_URL": "https://me:changed@index/x"}
    # The run folder may come from others: they get no password for a host or an index of theirs.
    for other in ({"ssh": "me@evil"}, {"url": "https://me:secret@other/x"}):
        write_home(tmp_path, **other)
        assert run(resume) == 2
        error = capsys.readouterr().err
        assert "cluster.hosts[0].env.PIP_INDEX_URL" in error and "secret" not in error
    assert run(resume, "cluster=home") == 0
    (tmp_path / "conf" / "cluster" / "home.yaml").unlink()
    assert run(resume) == 2
    assert run(resume, "cluster=local") == 0


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    """As `head` does; for what does not go through `echo`, such as Hydra's own output."""
    code = (
        "import sys, types; run = types.ModuleType('run'); sys.modules['smolrun.cli.run'] = run; "
        "run.run = lambda argv: sum(print('x' * 99) or 0 for _ in range(9999)); "
        "from smolrun.cli import main; sys.exit(main())"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as printing:
        printing.stdout.close()
        assert printing.stderr.read() == b""
        assert printing.wait(timeout=30) == 141


def test_another_broken_pipe_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def drive(config: RunConfig) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(sys.modules["smolrun.tasks.train"], "drive", drive)
    with pytest.raises(BrokenPipeError):
        run()


def test_words_of_other_programs_work(run: Run, driven: list[RunConfig]) -> None:
    assert run("algorithm=ddp", "training.gradient_checkpointing=true") == 0
    assert driven[0].algorithm.name == "classicdp"
    assert driven[0].training.recompute


def test_own_code_beside_the_shipped_is_own_code(
    run: Run, driven: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import smolrun.algorithms

    (tmp_path / "mine.py").write_text("def mine(context, *, pace): ...\n")
    monkeypatch.setattr(smolrun.algorithms, "__path__", [str(tmp_path)])
    assert run("algorithm.target=smolrun.algorithms.mine:mine", "algorithm.pace=2") == 0
    assert driven[0].algorithm.keywords() == {"pace": 2}
    assert run("algorithm.target=smolrun.algorithms.nothing:mine") == 2


def test_a_task_without_json_output_is_reported_with_all_other_problems(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--json", "training.steps=0") == 2
    error = capsys.readouterr().err
    assert "format = json: no such key" in error and "training.steps = 0" in error
    assert "did you mean task=status status.format=json or task=doctor doctor.format=json?" in error


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["task=stop", "run=x"], ["task=stop", "stop.run=x"]),
        (["run=x", "task=attach"], ["attach.run=x", "task=attach"]),
        (
            ["task=doctor", "write=true", "--json"],
            ["task=doctor", "doctor.write=true", "doctor.format=json"],
        ),
        (["+task=status", "+format=json"], ["+task=status", "+status.format=json"]),
        (["task=trust", "write=true"], ["task=trust", "trust.yes=true"]),
        (["run=x"], ["run=x"]),
    ],
)
def test_keys_of_a_task_have_short_names(typed: list[str], words: list[str]) -> None:
    assert without_aliases(typed) == words


@pytest.mark.parametrize(
    "text",
    [
        "a, b (c) 'q' \"d\" ${x} \\${y} \\ {z}",
        *("42", "null", "true", "", "-m", "~/x", "x=y, [1,2]", "größe 🎉", "'quoted'"),
        "two\nlines, ${oc.env:HOME}",
        *("\\", "ends with \\", "a\\'b", "${", "\\\\${a}", "\\\\\\${a} \\\\"),
    ],
)
def test_a_prompt_is_taken_as_it_is_typed(text: str, monkeypatch: pytest.MonkeyPatch):
    taken: list[str | None] = []
    monkeypatch.setattr(
        "smolrun.cli.run.drive", lambda config: taken.append(config.generate.prompt) or 0
    )
    assert run_command(["task=generate", f"prompt={text}"]) == 0
    assert taken == [text]


def test_the_model_of_a_run_needs_no_choice():
    assert compose(["task=serve", "model.run=a-run"]).model.name == "trained"
    assert compose(["task=serve"]).model.name == "smollm2_135m"
    assert compose(["task=chat", "model=hf", "model.name=x/y"]).model.name == "x/y"
