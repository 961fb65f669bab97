"""Decode steps: fast paths, each with its reference beside it, paged caches, and drafts of next tokens."""
