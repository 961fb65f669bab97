"""Decode steps: fast paths, each with its reference, paged caches, and drafts of next tokens."""
