"""Machines reached over SSH, by Fabric: the one place that knows it.

    settings.py    what ssh_config says about a host         login.py   the keys that are tried
    connect.py     from a name to a connection, or a HostError, in time; and a look at its host key
    failure.py     what went wrong, in one sentence          files.py   files there and back
    connection.py  commands, and whether it is still there   process.py a command that runs

Nothing is asked at a prompt, no key is trusted because it is new, and no wait is without an end.
"""

from smolrun.launch.ssh.connect import connect, scan
from smolrun.launch.ssh.connection import SshConnection
from smolrun.launch.ssh.hop import Found

__all__ = ["Found", "SshConnection", "connect", "scan"]
