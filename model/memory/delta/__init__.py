"""The delta memory: rows of vectors, written by the delta rule and read into the residual stream."""
