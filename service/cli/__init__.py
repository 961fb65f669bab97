"""The command line `imprint`."""
