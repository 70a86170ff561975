"""Machines that are found and paired without addresses, SSH or a cluster file.

discovery.py      who announces itself in the local network
pairing.py        one connection becomes trusted: a code typed by a person, or a remembered key
pairing_server.py the coordinator's port for machines that want to join
identity.py       this account's key, which others can remember
remembered.py     the machines whose keys this account keeps
"""
