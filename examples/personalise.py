"""200 users, one server: the session of each user learns which of 20 items the user takes, from past choices alone.

Needs a running server (`make serve`) and `pip install -e '.[scenarios]'`. Users are simulated (`research.scenarios`):
hidden weights of six visible traits, and a hidden bias for each item. Prints the share of items that were taken in the
first and the last 10 steps, beside items drawn at random, the most popular item and the best item for each user; writes
the curves to personalise.png.
"""

import argparse
import asyncio
from typing import Any

import httpx
import matplotlib
import numpy as np

from research.scenarios import Choices

matplotlib.use("Agg")


async def serve(url: str, users: Choices, steps: int, run: str) -> np.ndarray:
    """Show every user an item at each step, chosen by the server; return the items' probabilities [steps, users]."""
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def show(user: int, observation: list[float], reward: float | None) -> int:
            body: dict[str, Any] = {"model": "choices", "observation": observation}
            if reward is not None:
                body["reward"] = reward
            response = await client.post(f"/v1/sessions/{run}-{user}/act", json=body)
            response.raise_for_status()
            return int(response.json()["action"])

        return await play(users, steps, show)


async def play(users: Choices, steps: int, show: Any) -> np.ndarray:
    """Play all steps with items of `show(user, observation, reward)`; return their probabilities [steps, users]."""
    reward: list[float | None] = [None] * users.batch
    probs = []
    for _ in range(steps):
        observation, means = users.observe(), users.means()
        shown = await asyncio.gather(*(show(u, observation[u].tolist(), reward[u]) for u in range(users.batch)))
        probs.append(means[np.arange(users.batch), shown])
        reward = users.step(np.array(shown)).tolist()
    return np.stack(probs)


def without_learning(users: Choices, steps: int) -> dict[str, np.ndarray]:
    """Return the probabilities [steps, users] of random items, the most popular item and each user's best item."""
    rng, means = np.random.default_rng(0), users.means()
    most_popular = Choices(2000, np.random.default_rng(1)).means().mean(0).argmax()
    drawn = rng.integers(users.actions, size=(steps, users.batch))
    random = np.take_along_axis(means, drawn.T, axis=1).T
    flat = np.ones((steps, 1))
    return {"random": random, "most popular": flat * means[:, most_popular], "best for each": flat * means.max(1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--run", default="shopper", help="Prefix of the session names.")
    parser.add_argument("--out", default="personalise.png")
    args = parser.parse_args()
    curves = without_learning(Choices(args.users, np.random.default_rng(7)), args.steps)
    users = Choices(args.users, np.random.default_rng(7))
    curves["served, learning"] = asyncio.run(serve(args.url, users, args.steps, args.run))
    first, last = slice(0, 10), slice(args.steps - 10, None)
    print(f"{'share of items taken':<22} first 10  last 10")
    for name, curve in curves.items():
        print(f"{name:<22} {curve[first].mean():8.3f} {curve[last].mean():8.3f}")
    draw(curves, args.out)


def draw(curves: dict[str, np.ndarray], out: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(np.arange(1, len(curve) + 1), curve.mean(1), label=name)
    axes.set_xlabel("items shown to each user")
    axes.set_ylabel("share taken")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
