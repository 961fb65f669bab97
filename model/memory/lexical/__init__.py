"""The lexical site: rows of tokens at the output."""
