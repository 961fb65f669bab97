"""`python -m research.streams.omniglot FILE`: accuracy on drawn characters after one label a class.

An episode learns one drawing of each of N characters, each by another label, and then sees another drawing of each. No
arm has seen the characters: `policy`, whose embedding is trained on two thirds of the file's characters, is measured
on the others, as all arms are. Beside it stand `labels`, the learner of any table, and the nearest neighbour on pixels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory import Pool, choose_backend
from model.policies.network import Policy, new_policy
from research.corpus import console, progress_bar
from research.estimates import half_width
from research.scenarios.any_stream import as_columns
from research.scenarios.core import Tasks
from research.scenarios.label_stream import SCENARIO, load_omniglot
from research.streams.array_learners import ImprintLabels
from research.training.policy_loop import PolicyTrainer

Array = NDArray[Any]
Arm = Callable[[Array, Array], Array]  # drawings [N, P] of the labels 0 … N − 1, queries [M, P] → labels [M]
WAYS = (5, 20)
SEEDS, EPISODES = 5, 20  # episodes of each seed


def main() -> None:
    """Train the policy and print the table."""
    parser = argparse.ArgumentParser(prog="python -m research.streams.omniglot", description=__doc__)
    parser.add_argument("file", type=Path, help="an .npz file: x [n, 28, 28] of drawings, y [n] of their characters")
    parser.add_argument("--rounds", type=int, default=1500, help="rounds of the policy's training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = trained_policy(arguments.file, arguments.rounds)
    arms: dict[str, Arm] = {
        "policy, trained on other characters": lambda shots, queries: by_policy(policy, shots, queries),
        "labels, never trained on images": by_labels,
        "nearest neighbour on pixels": by_pixels,
    }
    classes = load_omniglot(arguments.file, held_out=True)
    for ways in WAYS:
        found: dict[str, list[float]] = {name: [] for name in arms}
        for seed in range(SEEDS):
            for name, accuracy in measure(arms, classes, ways, seed).items():
                found[name].append(accuracy)
        for name, values in found.items():
            console.print(f"{ways}-way: {name}: {np.mean(values):.3f} ± {half_width(values):.3f}")


def trained_policy(file: Path, rounds: int) -> Policy:
    """Return a policy that labels, of the recipe of `digits`, trained on the characters that are not held out."""
    options = {"ways": max(WAYS), "source": str(file)}
    recipe = replace(SCENARIO.recipes["digits"], options=options).with_train_config(rounds=rounds)
    policy = new_policy(recipe.config("omniglot"), seed=0)

    def make(batch: int, rng: np.random.Generator) -> Tasks:
        return recipe.make(batch, rng, training=True)

    with tempfile.TemporaryDirectory() as folder, progress_bar() as bar:
        bar_task = bar.add_task("training", total=rounds)
        trainer = PolicyTrainer(policy, make, recipe.train_config, Path(folder))
        trainer.run(lambda done, loss: bar.update(bar_task, completed=done, description=f"training, loss {loss:.3f}"))
    console.print(f"policy: trained for {trainer.seconds:.0f} s of one core")
    return policy


def measure(arms: dict[str, Arm], classes: list[Array], ways: int, seed: int) -> dict[str, float]:
    """Return the accuracy of each arm over EPISODES episodes of `ways` characters; all arms see the same drawings."""
    rng = np.random.default_rng([seed, ways])
    right = dict.fromkeys(arms, 0)
    for _ in range(EPISODES):
        drawn = [classes[number] for number in rng.permutation(len(classes))[:ways]]
        pairs = [images[rng.permutation(len(images))[:2]].reshape(2, -1) for images in drawn]
        shots, queries = np.stack(pairs, 1).astype(np.float32)
        for name, arm in arms.items():
            right[name] += int((arm(shots, queries) == np.arange(ways)).sum())
    return {name: count / (EPISODES * ways) for name, count in right.items()}


def by_policy(policy: Policy, shots: Array, queries: Array) -> Array:
    """Return the labels that a session of a policy gives to queries after it has learned the shots."""
    pool = Pool(policy.config.memory, rows=4096, sessions=4, backend=choose_backend(torch.device("cpu")))
    index = pool.open()
    for label, shot in enumerate(torch.from_numpy(shots)):
        draft = pool.draft(index)
        numbers = torch.tensor([label]), pool, torch.tensor([draft.index])
        policy.label_updates(shot[None], *numbers)[0].apply(draft)
        draft.commit()
    logs = policy.label(torch.from_numpy(queries), pool, torch.full((len(queries),), index))
    found: Array = logs[:, : len(shots)].argmax(1).numpy()
    return found


def by_labels(shots: Array, queries: Array) -> Array:
    """Return the labels that the learner of labels gives to queries; columns: the pixels."""
    learner = ImprintLabels()
    for label, shot in enumerate(shots):
        learner.predict(as_columns(shot))
        learner.learn(as_columns(shot), label)
    probs = [learner.predict(as_columns(query)) for query in queries]
    return np.array([max(each, key=each.__getitem__) for each in probs])


def by_pixels(shots: Array, queries: Array) -> Array:
    """Return the labels of the nearest shots."""
    nearest: Array = ((queries[:, None] - shots[None]) ** 2).sum(-1).argmin(1)
    return nearest


if __name__ == "__main__":
    main()
