"""Starts the workers of a run, watches them, and ends them: on this machine now, over SSH later.

    control.py     the language: JSON lines over the worker's stdin and stdout (pure)
    channel.py     the worker's end of it
    hosts.py       what is asked of a host; local.py is the one on this machine
    attendant.py   the driver's end: the threads around one worker
    moves.py, cause.py, supervisor.py   what can happen, who is to blame, what to do (pure)
    driver.py      runs the supervisor against real workers

It knows nothing of training: of all that a worker reports, nothing here reads more than the step.
"""
