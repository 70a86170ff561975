"""What may break a rule of rules.py, each with its reason. A needless exception fails the test."""

# TODO (issue 11): empty but for the first
FILES: dict[str, str] = {
    "smolrun/cli/__main__.py": "python -m smolrun.cli",
    "smolrun/config/not_built.py": "to be merged into its user",
    "smolrun/config/replica_checks.py": "to be merged into its user",
    "smolrun/driver/elasticity.py": "to be merged into its user",
    "smolrun/driver/reachable_hosts.py": "to be merged into its user",
    "smolrun/driver/roles.py": "to be merged into its user",
    "smolrun/launch/delivery/progress.py": "to be merged into its user",
    "smolrun/launch/doctor/this_machine.py": "to be merged into its user",
    "smolrun/launch/on_host/clock.py": "to be merged into its user",
    "smolrun/launch/on_host/disk.py": "to be merged into its user",
    "smolrun/launch/on_host/run_folder.py": "to be merged into its user",
    "smolrun/launch/remote/error_tail.py": "to be merged into its user",
    "smolrun/launch/remote/host.py": "to be merged into its user",
    "smolrun/launch/ssh/dial.py": "to be merged into its user",
    "smolrun/wire/credentials.py": "to be merged into its user",
}

FUNCTIONS: dict[str, str] = {
    "smolrun/models/decoder.py::build": "half of it is its signature, the keys of the yaml",
}

# TODO (issue 11): empty
CLASSES: dict[str, str] = dict.fromkeys(
    (
        "Hop",
        "Told",
        "Interface",
        "Way",
        "Door",
        "Connection",
        "Slice",
    ),
    "one of the two is to be renamed",
)

# Names of files that are an example or another project's.
PATHS = {"my_code.py", "build_meta.py", "tasks/ping.py"}
