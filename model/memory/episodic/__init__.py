"""The episodic memory: spans of a session's past as token ids, found again by their words."""
