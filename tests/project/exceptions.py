"""What may break a rule of rules.py, each with its reason. A needless exception fails the test."""

# TODO (issue 11): empty but for the first
FILES: dict[str, str] = {
    "smolrun/cli/__main__.py": "python -m smolrun.cli",
    "smolrun/driver/reachable_hosts.py": "to be merged into its user",
    "smolrun/launch/on_host/clock.py": "a script that runs alone on a host",
    "smolrun/launch/on_host/disk.py": "a script that runs alone on a host",
    "smolrun/launch/on_host/run_folder.py": "a script that runs alone on a host",
}

FUNCTIONS: dict[str, str] = {
    "smolrun/models/decoder.py::build": "half of it is its signature, the keys of the yaml",
}

# TODO (issue 11): empty
CLASSES: dict[str, str] = {}

# Names of files that are an example or another project's.
PATHS = {"my_code.py", "build_meta.py", "tasks/ping.py"}
