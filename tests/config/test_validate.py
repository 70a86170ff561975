"""Every problem of a configuration in one error, each with key, value and what is allowed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.config import config_hash, resolved, validate
from smolrun.config.algorithms import ClassicDPConfig
from smolrun.config.base import CustomTargetConfig
from smolrun.config.models import DecoderConfig
from smolrun.errors import ConfigError


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return resolved(compose())


def changed(shipped: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The shipped configuration with keys set; `training__steps` is the key steps of training."""
    data = copy.deepcopy(shipped)
    for path, value in changes.items():
        *groups, key = path.split("__")
        place = data
        for group in groups:
            place = place[int(group)] if isinstance(place, list) else place[group]
        place[key] = value
    return data


def problems(shipped: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(changed(shipped, **changes))
    return error.value.problems


def test_the_shipped_configuration_is_valid(shipped: dict[str, Any]):
    config = validate(shipped)
    assert isinstance(config.model, DecoderConfig)
    assert isinstance(config.algorithm, ClassicDPConfig)
    assert config.algorithm.keywords() == {"bucket_mb": 4.0, "shard_optimizer": "auto"}
    assert config.training.warmup_steps == 30


def test_resolved_is_plain_json_and_comes_back_equal(shipped: dict[str, Any]):
    config = validate(shipped)
    travelled = json.loads(json.dumps(resolved(config), allow_nan=False))
    assert validate(travelled) == config
    assert config_hash(validate(travelled)) == config_hash(config)


def test_the_hash_tells_configurations_apart(shipped: dict[str, Any]):
    one, other = validate(shipped), validate(changed(shipped, seed=1))
    assert config_hash(one) != config_hash(other)
    assert len(config_hash(one)) == 16
    assert int(config_hash(one), 16) >= 0


def test_values_cannot_be_changed_later(shipped: dict[str, Any]):
    with pytest.raises(ValueError, match="frozen"):
        validate(shipped).training.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"training__steps": 0},
            "training.steps = 0: too small; allowed: an integer >= 1",
        ),
        (
            {"training__steps": "many"},
            "training.steps = many: not an integer; allowed: an integer >= 1",
        ),
        (
            {"training__steps": True},
            "training.steps = true: not an integer; allowed: an integer >= 1",
        ),
        (
            {"optimizer__lr": float("nan")},
            "optimizer.lr = NaN: not a finite number; allowed: a number > 0",
        ),
        (
            {"optimizer__lr": float("inf")},
            "optimizer.lr = Infinity: not a finite number; allowed: a number > 0",
        ),
        (
            {"optimizer__betas": [0.9]},
            "optimizer.betas = [0.9]: too few entries; allowed: a list of 2 numbers >= 0 and < 1",
        ),
        (
            {"optimizer__betas": [0.9, 1.5]},
            "optimizer.betas[1] = 1.5: too large; allowed: a list of 2 numbers >= 0 and < 1",
        ),
        (
            {"optimizer__name": "adam"},
            "optimizer.name = adam: no such choice; allowed: adamw or adafactor or lion or sgd; "
            "did you mean adamw?",
        ),
        (
            {"cluster__ranks": 0},
            "cluster.ranks = 0: too small; allowed: auto or an integer >= 1",
        ),
        (
            {"cluster__ranks": "two"},
            "cluster.ranks = two: not understood; allowed: auto or an integer >= 1",
        ),
        (
            {"model__position": "ropes"},
            "model.position = ropes: no such choice; allowed: rope or learned; did you mean rope?",
        ),
        (
            {"model__tie_embeddings": 1},
            "model.tie_embeddings = 1: neither true nor false; allowed: true or false",
        ),
        (
            {"training__lr_schedule": None},
            "training.lr_schedule = null: no such choice; allowed: cosine or linear or constant",
        ),
        (
            {"run_name": "../x"},
            "run_name = ../x: not of the right form; allowed: letters, digits, dot, dash and"
            " underscore (100 at most), or null",
        ),
        ({"seed": -1}, "seed = -1: too small; allowed: an integer >= 0"),
        ({"training": 5}, "training = 5: not a group of keys"),
        (
            {"mesh__security": "ssl"},
            "mesh.security = ssl: no such choice; allowed: auto or tls or loopback_plain or "
            "insecure",
        ),
        (
            {"quantization__kind": "int4"},
            "quantization.kind = int4: no such choice; allowed: none or int8 or fp16 or bf16",
        ),
        ({"quantization__block": 4}, "quantization.block = 4: too small; allowed: "),
        *(
            (
                {"serving__allowed_hosts": ["mini.local", host]},
                f"serving.allowed_hosts[1] = {host}: not of the right form; allowed: a list of "
                "names or addresses without a port, or * for any",
            )
            for host in ("mini.local:7665", "http://mini.local", "*.local", "::1")
        ),
        *(
            (
                {"serving__cors_origins": ["app://obsidian.md", origin]},
                f"serving.cors_origins[1] = {origin}: not of the right form; allowed: a list of "
                "origins as browsers send them",
            )
            for origin in ("http://localhost:3000/", "*", "null", "localhost:3000", "https://A.org")
        ),
        (
            {"serving__compare_with": ["http://mini1:7665; script-src *"]},
            "serving.compare_with[0] = http://mini1:7665; script-src *: not of the right form; ",
        ),
        (
            {"serving__cors_origins": ["https://page.example:443"]},
            "serving.cors_origins[0] = https://page.example:443: browsers leave this port out; ",
        ),
    ],
)
def test_one_bad_value_is_one_line(shipped: dict[str, Any], changes: dict[str, Any], line: str):
    found = problems(shipped, **changes)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_a_missing_key_is_told(shipped: dict[str, Any]):
    del shipped["training"]["steps"], shipped["data"]
    try:
        (first, second) = problems(shipped)
    finally:
        shipped.update(resolved(compose()))
    assert first.startswith("data: must be given")
    assert second == "training.steps: must be given; allowed: an integer >= 1"


def test_all_problems_come_at_once_and_checks_run_for_what_is_sound(shipped: dict[str, Any]):
    found = problems(
        shipped, optimizer__lr="fast", training__stepz=1, model__heads=3, mesh__timeout_s=0
    )
    assert [line.partition(" = ")[0] for line in found] == [
        "optimizer.lr",
        "training.stepz",
        "mesh.timeout_s",
        "model.heads",
    ]


@pytest.mark.parametrize(
    ("changes", "key", "what"),
    [
        ({"cluster__ranks": 33}, "training.global_batch_size = 32", "too small for 33 ranks"),
        ({"training__micro_batch_size": 33}, "training.micro_batch_size = 33", "1 to 32"),
        ({"training__warmup_steps": 301}, "training.warmup_steps = 301", "0 to 300"),
        ({"staleness__bound": 300}, "staleness.bound = 300", "less than training.steps"),
        ({"data__sequence_length": 257}, "data.sequence_length = 257", "1 to 256"),
        ({"model__kv_heads": 3}, "model.kv_heads = 3", "divisor of model.heads"),
        ({"model__heads": 3}, "model.heads = 3", "does not divide model.width"),
        ({"model__head_width": 31}, "model.head_width = 31", "even"),
        ({"cluster__hosts": [{"name": "a"}] * 2}, "cluster.hosts = a", "2 hosts"),
        (
            {"cluster__hosts": [{"name": "a"}], "cluster__ranks": 2},
            "cluster.ranks = 2",
            "no meaning",
        ),
        (
            {"cluster__hosts": [{"name": "a", "ranks": 2, "emulate": {"compute": 0.5}}]},
            "cluster.hosts[0].ranks = 2",
            "a emulates a slower machine, with one rank; allowed: 1",
        ),
        (
            {"cluster__hosts": [{"name": "a", "device": "mps", "emulate": {"compute": 0.5}}]},
            "cluster.hosts[0].device = mps",
            "allowed: cpu",
        ),
        (
            {"cluster__hosts": [{"name": "a", "emulate": {}}], "cluster__threads": 2},
            "cluster.threads = 2",
            "with one thread; allowed: auto or 1",
        ),
        (
            {"model__target": "no_such_module_here.x:build"},
            "model.target = no_such_module_here.x:build",
            "there is no module no_such_module_here",
        ),
    ],
)
def test_groups_must_fit_each_other(
    shipped: dict[str, Any], changes: dict[str, Any], key: str, what: str
):
    (line,) = problems(shipped, **changes)
    assert line.startswith(f"{key}: ")
    assert what in line


@pytest.mark.parametrize(
    "target", ["build", "a.b", "a b:c", "smolrun.models.decoder:biuld", ":x", "a:"]
)
def test_a_target_names_a_module_and_something_in_it(shipped: dict[str, Any], target: str):
    assert problems(shipped, model__target=target)[0].startswith(f"model.target = {target}: ")


def test_your_own_target_keeps_its_keys(shipped: dict[str, Any]):
    own = {"name": "mine", "target": "json.decoder:JSONDecoder", "strict": True, "sizes": [1, 2]}
    config = validate(changed(shipped, model=own))
    assert isinstance(config.model, CustomTargetConfig)
    assert config.model.keywords() == {"strict": True, "sizes": [1, 2]}
    assert resolved(config)["model"] == {**own, "loss": None}


def test_an_own_loss_is_no_key_of_its_model(shipped: dict[str, Any]):
    config = validate(changed(shipped, model__loss="json.decoder:JSONDecoder"))
    assert "loss" not in config.model.keywords()
    assert resolved(config)["model"]["loss"] == "json.decoder:JSONDecoder"
    for name, what in [("loss", "not of the form"), ("no_such_module:x", "there is no module")]:
        (line,) = problems(shipped, model__loss=name)
        assert line.startswith(f"model.loss = {name}: {what}")
    (line,) = problems(shipped, task="bench", model__loss="json:loads")
    assert line.startswith("model.loss = json:loads: task=bench compares")


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 1), (300, 30), (100_000, 100)])
def test_auto_warmup_is_a_tenth_at_most_a_hundred(shipped: dict[str, Any], steps: int, warmup: int):
    config = validate(changed(shipped, training__steps=steps, training__warmup_steps="auto"))
    assert config.training.warmup_steps == warmup


def test_single_is_one_rank(shipped: dict[str, Any]):
    single = {"name": "single", "target": "smolrun.algorithms.single:Single"}
    assert validate(changed(shipped, algorithm=single)).algorithm.name == "single"
    (line,) = problems(shipped, algorithm=single, cluster__ranks=2)
    told = "cluster.ranks = 2: algorithm=single is one rank; allowed: cluster.ranks=1, or "
    assert line.startswith(told)


def test_a_model_must_read_what_the_data_gives():
    with pytest.raises(ConfigError, match="model = mlp: reads features, but data=python_stdlib"):
        compose(["model=mlp", "data=python_stdlib"])
    with pytest.raises(ConfigError, match="model = gpt2: reads tokens, but data=digits"):
        compose(["model=gpt2", "data=digits"])


def test_only_a_model_of_blocks_can_recompute_them():
    with pytest.raises(ConfigError, match="model=mlp has no blocks to compute twice"):
        compose(["model=mlp", "training.recompute=true"])


def test_delayed_updates_of_one_rank_are_allowed():
    assert compose(["algorithm=single", "staleness.bound=2"]).staleness.bound == 2


def test_nesterov_needs_momentum():
    with pytest.raises(ConfigError, match="needs momentum"):
        compose(["optimizer=sgd", "optimizer.nesterov=true", "optimizer.momentum=0.0"])
