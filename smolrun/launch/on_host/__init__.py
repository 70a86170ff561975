"""Scripts that run on a host, each file alone, sent over stdin (remote/call.py).

Only the standard library, Python >= 3.8, and nothing of smolrun but prelude.py, which is sent with
each of them: a host may be blank.
"""
