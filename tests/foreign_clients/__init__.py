"""Checks of real clients, newest versions, against a real server: `make clients`.

Each file has the checks of one client; its head names what pip or npm installs for it, in an environment of its own.
"""
