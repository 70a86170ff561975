"""Hosts over SSH, by Fabric and paramiko: the only folder that imports them.

    settings.py    what ssh_config says about a host       host_keys.py  known_hosts files
    connect.py     a login with a deadline, or HostError; scans of host keys; a machine after both
    login.py       the keys that are tried                 hop.py        one server on the way, and
    connection.py  commands and a keepalive                              why it failed
    files.py       SFTP

Nothing prompts, no key is trusted because it is new, and every wait has a deadline.
"""
