"""The server: everything around the model that clients, operators and the store see."""
