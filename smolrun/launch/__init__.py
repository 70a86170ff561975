"""Starts the workers of a run, watches them, and ends them: on this machine and over SSH.

Processes and control
    control.py     the protocol: JSON lines over the worker's stdin and stdout (pure)
    channel.py     the worker's end of it; wake.py keeps its machine awake
    hosts.py       the interface of a host; local.py implements it by subprocess
    worker_monitor.py   the driver's end: the threads around one worker
    supervisor_events.py, root_cause.py, supervisor.py, elastic.py, restart.py
                   what can happen, which rank is the cause, what to do (pure)
    driver.py      runs the supervisor against real workers
    streams.py     rows of streamed data over the control protocol

Folders, of which each imports only those below it (import-linter: "launch")
    doctor/        task=doctor: probes hosts and links, and what the answers mean
    setup/         task=setup: Python, packages and the user's key on a host
    delivery/      code, data and checkpoints to hosts, and shards of checkpoints back
    ssh/           implements the connection of remote/ by Fabric and paramiko
    remote/        a host over a connection: its shell, its Python, commands and workers there
    on_host/       scripts that run on the host by its own Python; they import nothing of smolrun

It knows nothing of training: of what a worker reports, the supervisor reads no more than the step,
and delivery/ no more than what was saved.
"""
