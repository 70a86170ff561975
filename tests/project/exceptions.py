"""What may break a rule of rules.py, each with its reason. A needless exception fails the test."""

_SCRIPT = "a script that runs on a host by itself"

FILES: dict[str, str] = {
    "smolrun/cli/__main__.py": "python -m smolrun.cli",
    "smolrun/launch/on_host/clock.py": _SCRIPT,
}

FUNCTIONS: dict[str, str] = {
    "smolrun/models/decoder.py::build": "half of it is its signature, the keys of the yaml",
}

CLASSES: dict[str, str] = {
    "Batch": "of samples in training; of tokens in serving",
    "Finished": "of a command on a host; of a request",
}

# Files of an example or of another project.
PATHS = {
    *("my_code.py", "my_loss.py", "build_meta.py", "tasks/ping.py"),
    "smolrun/algorithms/mydp.py",
}
