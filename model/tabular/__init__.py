"""Tabular learners: one memory that learns the stream that it is pointed at, labels, numbers or rewards.

`config` is the shape of a learner and its memory, `backend` the contract with the engine, `examples` the rows of what
was learned. The learners of the three tasks are in `labels`, `regression` and `bandit`.
"""
