"""Tabular learners: one memory that learns the stream that it is pointed at, labels, numbers or rewards.

- `config` is the shape of a learner, `backend` the contract with the engine, `loading` makes learners.
- `memory` is the memory of a session, as rows in a pool and as arrays; `columns` brings its columns to one scale.
- Readers compute from the stored examples: `readers` and `number_kernels` one by one, `label_readers`,
  `number_readers` and `arm_readers` together. `reference` has them in plain NumPy.
- `mixer` is the network that weighs readers, `change` notices when a stream changes.
- `labels`, `numbers` and `arms` are the steps of a task on arrays, `label_learner`, `number_learner` and
  `reward_learner` the same between a pool and a draft. `checkpoint` is what the three share.
"""
