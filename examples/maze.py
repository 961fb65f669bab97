"""A maze with an unseen goal that moves, and a session that learns its way within one walk: `gymnasium` and `act`.

Needs a running server and `pip install 'imprint[scenarios]'`. `--model graph-walk` walks on a graph instead.
"""

import argparse
from typing import Any

import gymnasium
import numpy as np

import research.scenarios  # noqa: F401  (registers the environments)
from imprint import Client

ENVIRONMENTS = {"maze": "imprint/Maze-v0", "graph-walk": "imprint/GraphWalk-v0"}


def walk(client: Client, session: str, model: str, seed: int) -> tuple[list[float], list[float]]:
    """Walk to the end of an episode; return the rewards, and the steps that were lost on each step."""
    env: gymnasium.Env[Any, Any] = gymnasium.make(ENVIRONMENTS[model])
    seen, _ = env.reset(seed=seed)
    rewards, lost, is_over = list[float](), list[float](), False
    last: dict[str, Any] = {}
    while not is_over:
        done = client.act(session, seen.tolist(), model=model, **last)
        seen, reward, _, is_over, info = env.step(np.int64(done.action))
        last = {"reward": float(reward), "action_id": done.action_id}
        rewards.append(float(reward))
        lost.append(info["regret"])
    return rewards, lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(ENVIRONMENTS), default="maze")
    parser.add_argument("--walks", type=int, default=10)
    arguments = parser.parse_args()
    with Client() as client:
        walks = [walk(client, f"walker-{seed}", arguments.model, seed) for seed in range(arguments.walks)]
        rewards, lost = (np.array(parts) for parts in zip(*walks, strict=True))
        for start in range(0, rewards.shape[1], 50):
            part = slice(start, start + 50)
            goals, steps = rewards[:, part].sum(1).mean(), lost[:, part].mean()
            print(f"steps {start + 1} to {start + 50}: {goals:.1f} goals, {steps:.2f} steps lost per step")
        for seed in range(arguments.walks):
            client.delete(f"walker-{seed}")
