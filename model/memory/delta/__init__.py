"""The delta site: rows of vectors, written by the delta rule."""
