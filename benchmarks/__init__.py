"""Measurements of the server beside its peers, on the same weights, prompts and sampling.

- `run`: `imprint bench`, which starts the arms, runs the scenarios and writes the results.
- `testbed`, `scenarios`, `states`: the arms with their sessions and rounds, and what is timed on them.
- `peers`, `transformers_worker`, `stream_timing`: the measured processes, and the timing of one generation.
- `texts`, `profiling`: prompts and random sessions, and the profile of a model step outside of the server.
- `targets`, `report`, `plots`: the performance targets, the tables and the figures.
- `commits`: the cost of commits alone, as a program of its own.

A server imports nothing of this package.
"""
