"""The lexical memory: rows of tokens, read into the output distribution."""
