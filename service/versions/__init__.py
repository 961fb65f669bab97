"""Versions of a session: undo, unlearn, fork, export and import, and views of them."""
