"""A fault-injection test: clients teach sessions while processes, disks, lines and keys fail.

Each client repeats a turn until it is acknowledged, then sends the next one. At the end, a session's log must name the
acknowledged turns, each once and at the acknowledged version. A client that hung up got no acknowledgement, so its turn
may be in the log or not. The session's rows, scalars, version and counters must equal, bit for bit, what the model
alone makes of these turns. A session that lost a key in the store must say so, or be unharmed by the loss.
"""
