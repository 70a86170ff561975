"""Small programs that run on a host, whatever it has: each file alone, sent over stdin (call.py).

Only the standard library, Python >= 3.8, and nothing of smolrun: a host may be blank. Nor of each
other, so a few of them have the same five lines that read a file or run a command.
"""
