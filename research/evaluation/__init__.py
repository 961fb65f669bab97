"""Measuring what a memory is worth: the same tokens with it and without it, scored before they are learned."""
