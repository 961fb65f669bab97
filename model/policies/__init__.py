"""Policies: small networks that act or label from a session's memory.

`config` is the shape of a policy, `network` the torch network (the reference), `numba_step` the compiled step for CPUs,
`backend` the contract of both and the choice between them, `journal` the actions that wait for rewards, and
`change_point` the detection of changed labels. Training and scenarios are in `research`.
"""
