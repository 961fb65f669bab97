"""The store that speaks the Redis protocol."""
