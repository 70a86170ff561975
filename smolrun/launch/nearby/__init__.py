"""Machines that are found and paired without addresses, SSH or a cluster file.

discovery.py       who announces itself in the local network
pairing.py         one connection becomes trusted: by a code typed by a person, or by known keys
pairing_server.py  the coordinator's port for machines that want to join
codes.py           the code, and how often a wrong one may be tried
messages.py        the messages of a pairing
machine_key.py     this account's key, which others can remember
remembered.py      the machines whose keys this account keeps
"""
