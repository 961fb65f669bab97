"""A gymnasium environment of one step an episode, and a session that learns to act in it: the five lines are `play`."""

from typing import Any

import gymnasium
import numpy as np

from imprint import Client


class Vending(gymnasium.Env[np.ndarray[Any, Any], Any]):
    """A vending machine that offers one thing: what sells depends on the temperature and on the hour."""

    observation_space = gymnasium.spaces.Box(np.array([-10, 0], np.float32), np.array([35, 24], np.float32))
    action_space = gymnasium.spaces.Discrete(3)  # coffee, lemonade, soup

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(self.observation_space.low, self.observation_space.high)
        return self.state, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        temperature, hour = self.state
        wanted = 1 if temperature > 18 else 0 if hour < 11 else 2
        sold = self.np_random.random() < (0.8 if action == wanted else 0.2)
        return self.state, float(sold), True, False, {}


def play(client: Client, session: str, env: gymnasium.Env[Any, Any], steps: int) -> list[float]:
    """Act for some episodes, and return the rewards."""
    rewards: list[float] = []
    actions = [str(action) for action in range(env.action_space.n)]  # type: ignore[attr-defined]
    last: dict[str, Any] = {}
    for step in range(steps):
        seen, _ = env.reset(seed=step)
        done = client.act(session, actions=actions, context=seen.tolist(), model="bandit", **last)
        _, reward, *_ = env.step(int(done.action))
        last = {"reward": float(reward), "action_id": done.action_id}
        rewards.append(float(reward))
    return rewards


if __name__ == "__main__":
    with Client() as client:
        earned = play(client, "vending", Vending(), 300)
        for start in range(0, 300, 100):
            print(f"sales of {start + 1} to {start + 100}: {sum(earned[start : start + 100]):.0f}")
        client.delete("vending")
