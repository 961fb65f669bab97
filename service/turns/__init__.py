"""Turns: one turn loads a session, runs it, commits it and tells the client."""
