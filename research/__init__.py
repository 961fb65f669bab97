"""The commands that work on the model itself, without a server."""
