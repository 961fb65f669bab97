"""The worth of a memory: arms that score the same tokens with and without the memory, before the memory learns them."""
