"""Other names of keys and choices. Pure data.

Aliases work as they are typed. Names of earlier versions are renamed in stored configurations.
Words of other programs are hints in error messages.
"""

from __future__ import annotations

KEY_ALIASES = {"training.gradient_checkpointing": "training.recompute"}
CHOICE_ALIASES = {
    "algorithm": {"ddp": "classicdp"},
    "experiment": {"late_gradients": "stale_gradients"},  # names of earlier versions
    "training": {"pictures": "images"},
}
TASK_KEY_ALIASES = {
    "attach": {"run": "attach.run"},
    "compare": {
        "runs": "compare.runs",
        "sweep": "compare.sweep",
        "metric": "compare.metric",
        "out": "compare.out",
    },
    "doctor": {"write": "doctor.write", "format": "doctor.format"},
    "chat": {"system": "chat.system"},
    "logs": {
        "run": "logs.run",
        "follow": "logs.follow",
        "rank": "logs.rank",
        "level": "logs.level",
        "since": "logs.since",
        "format": "logs.format",
    },
    "generate": {"prompt": "generate.prompt"},
    "status": {"format": "status.format"},
    "stop": {"run": "stop.run"},
    "trust": {"write": "trust.yes", "forget": "trust.forget"},
    "watch": {"run": "watch.run", "replay": "watch.replay", "speed": "watch.speed"},
}
"""Task -> short name of a key -> the key."""

RENAMED_KEYS: dict[str, str | None] = {
    "algorithm.damping": "algorithm.staleness_lr_scale",
    "algorithm.owner_computes": "algorithm.shard_optimizer",
    "algorithm.patience": "algorithm.wait_fraction",
    "algorithm.polyak": "algorithm.ema_decay",
    "algorithm.pull": "algorithm.pull_weights",
    "algorithm.straggler_s": "algorithm.straggler_timeout_s",
    "bench.patience": "bench.wait_fraction",
    "training.norms": "training.log_norms",
    "training.norms_every": "training.log_norms_every",
    # Keys of tasks that make no run folder: a resumed run does not need the stored value.
    "format": None,
    "run": None,
    "write": None,
}
"""Key of an earlier version, as in the config.yaml of its runs -> its name now; None: dropped."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    # choices
    "bfloat16": ("bf16",),
    "bf16-mixed": ("bf16",),
    "float16": ("fp16",),
    "half": ("fp16",),
    "16-mixed": ("fp16",),
    "fp32": ("float32",),
    "float": ("float32",),
    "fp64": ("float64",),
    "double": ("float64",),
    "8bit": ("int8",),
    "zero": ("fsdp",),
    "deepspeed": ("fsdp",),
    "parameter_server": ("syncps", "edp"),
    "ps": ("syncps", "edp"),
    "hogwild": ("edp",),
    "adam": ("adamw",),
    "weights_and_biases": ("wandb",),
    # keys; one after a choice is a key of that choice only
    "batch_size": ("training.global_batch_size", "training.micro_batch_size"),
    "train_batch_size": ("training.global_batch_size",),
    "per_device_train_batch_size": ("training.micro_batch_size",),
    "gradient_accumulation_steps": ("training.micro_batch_size",),
    "gradient_checkpointing": ("training.recompute",),
    "activation_checkpointing": ("training.recompute",),
    "epochs": ("training.steps",),
    "num_train_epochs": ("training.steps",),
    "max_steps": ("training.steps",),
    "iterations": ("training.steps",),
    "learning_rate": ("optimizer.lr",),
    "max_grad_norm": ("training.grad_clip",),
    "eval_steps": ("training.eval_every",),
    "save_steps": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "resume_from_checkpoint": ("checkpoint.resume",),
    "resume": ("checkpoint.resume",),
    "block_size": ("data.sequence_length",),
    "max_seq_length": ("data.sequence_length",),
    "context_length": ("data.sequence_length",),
    "norms": ("training.log_norms",),
    "log_gradients": ("training.log_norms",),
    "world_size": ("cluster.ranks",),
    "nproc_per_node": ("cluster.ranks",),
    "num_processes": ("cluster.ranks",),
    "accelerator": ("cluster.device",),
    "dtype": ("precision",),
    "mixed_precision": ("precision",),
    "num_layers": ("model.layers",),
    "n_layer": ("model.layers",),
    "num_hidden_layers": ("model.layers",),
    "hidden_size": ("model.width",),
    "n_embd": ("model.width",),
    "d_model": ("model.width",),
    "num_heads": ("model.heads",),
    "n_head": ("model.heads",),
    "num_attention_heads": ("model.heads",),
    "run": ("task=attach attach.run", "task=stop stop.run", "task=watch watch.run"),
    "write": ("task=doctor doctor.write", "task=trust trust.yes"),
    "format": ("task=status status.format", "task=doctor doctor.format"),
    "data.path": ("data=text data.path",),
    "path": ("data=text data.path",),
}
