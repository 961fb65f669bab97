"""The base: a frozen pretrained decoder, its files and its linear maps."""
