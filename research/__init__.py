"""Training, evaluation and scenarios of memories and policies, without a server.

- `evaluation/`: the arms and probes of `imprint eval`; `command` wires them.
- `training/`: the meta-training of memories (`command`) and of policies (`policy_command`), both `imprint train`.
- `scenarios/`: the tasks that policies act in, and their baselines; `command` is `imprint scenario`.
- `corpus`, `runs`, `estimates`, `machine`, `plots`: texts as streams, the result cache, intervals, the description of
  the machine, and figures, which all commands share.

The command modules only check options, call the modules beside them and write files. A server imports nothing of this
package.
"""
