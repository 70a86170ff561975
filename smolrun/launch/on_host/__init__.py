"""Scripts that run on a host, each file alone, sent over stdin (remote/call.py).

Only the standard library, Python >= 3.8, and nothing of smolrun: a host may be blank. They do not
import each other, so a few repeat the same lines that read a file or run a command.
"""
