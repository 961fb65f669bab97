"""Fast paths of a decoding step, each with a reference beside it."""
