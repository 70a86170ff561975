"""Starts the workers of a run, watches them, and ends them: on this machine and over SSH.

A run
    control.py     the language: JSON lines over the worker's stdin and stdout (pure)
    channel.py     the worker's end of it; wake.py keeps its machine awake
    hosts.py       what is asked of a host; local.py is the one on this machine, remote.py over SSH
    attendant.py   the driver's end: the threads around one worker
    moves.py, cause.py, supervisor.py, restart.py   what can happen, who is to blame, what to do
    driver.py      runs the supervisor against real workers

A machine elsewhere
    connection.py  what is asked of a connection; ssh/ is the real one, host_keys.py its memory
    shell.py, call.py, on_host/   how commands and small programs get there
    machine.py, meeting.py, find_python.py   a host that answered, and what it is
    remote_worker.py   a worker there
    delivery/      brings code, data and checkpoints there, and back what was saved

task=doctor
    examination.py, reach_test.py, this_machine.py, system_ssh.py   ask
    findings.py, links.py, reachability.py, firewall.py, verdicts.py   what it means (pure)

task=setup
    blank_host.py, setup_plan.py, environment.py   what there is, what is to be done (pure)
    environment_maker.py, uv_program.py, user_key.py   do it

It knows nothing of training: of what a worker reports, the supervisor reads no more than the step,
and delivery/ no more than what was saved.
"""
