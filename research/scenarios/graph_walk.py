"""The graph walk: learn where the edges of an unknown graph lead, to reach a goal, while several nodes look alike."""

from __future__ import annotations

import numpy as np

from research.scenarios.baselines import RandomActor, TeacherActor
from research.scenarios.core import FloatArray, IntArray
from research.scenarios.measures import ActingEvaluation
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario
from research.scenarios.walks import GoalTasks, steps_after


class GraphWalk(GoalTasks):
    """A random directed graph. Entering the goal pays 1 and puts the agent onto a random node; any other step pays 0.

    The agent sees the colour of its node alone; `nodes / colours` nodes have the same one (a partially observed Markov
    decision process). An action leads from each node to another one. The edges of action 0 are one circle of all nodes,
    so that there is always a way. moves: probability of another goal after one was found.
    """

    def __init__(
        self,
        batch: int,
        rng: np.random.Generator,
        *,
        nodes: int = 6,
        colours: int = 3,
        actions: int = 3,
        moves: float = 0.0,
    ) -> None:
        super().__init__(batch, rng, moves)
        self.context, self.actions, self.nodes = colours, actions, nodes
        self.colour = rng.permuted(np.tile(np.arange(nodes) % colours, (batch, 1)), axis=1)
        # An edge leads at least one node on, so that no edge leads back to its own node.
        edges = (np.arange(nodes)[:, None] + rng.integers(1, nodes, size=(batch, nodes, actions))) % nodes
        edges[:, :, 0] = _circles(batch, nodes, rng)
        self.begin(edges)
        self.tried = np.zeros((batch, nodes, actions), bool)

    def observe(self) -> FloatArray:
        colour = self.colour[np.arange(self.batch), self.state]
        observed: FloatArray = np.equal(np.arange(self.context), colour[:, None]).astype(np.float32)
        return observed

    def step(self, actions: IntArray) -> FloatArray:
        self.tried[np.arange(self.batch), self.state, actions] = True
        return super().step(actions)

    def teacher_scores(self) -> FloatArray:
        """Return minus the steps [B, A] to the goal over edges that were tried, or to the nearest edge that was not.

        The teacher sees the nodes, which the agent must tell apart by where it comes from. An edge that was not tried
        leads to half as many steps as there are nodes.
        """
        task = np.arange(self.batch)
        known = np.where(self.tried, self.next, -1)
        steps = steps_after(known, self.state, self.wanted())
        exploring = steps_after(known, self.state, np.logical_not(self.tried.all(2))) + self.nodes / 2
        guess = np.where(self.tried[task, self.state], exploring, 1 + self.nodes / 4)
        scores: FloatArray = -np.minimum(steps, guess).astype(np.float32)
        return scores

    def expected_rewards(self) -> FloatArray:
        """Return the probability [B, A] that an action enters the goal."""
        task = np.arange(self.batch)
        following, tried = self.next[task, self.state], self.tried[task, self.state]
        open_ = ~self.missed[task[:, None], following]
        chance = np.where(tried, open_ / np.maximum(1, (~self.missed).sum(1, keepdims=True)), 1 / self.nodes)
        known = np.where(tried, (1 - self.moves) * (following == self.believed[:, None]), 1 / self.nodes)
        probs: FloatArray = np.where(self.believed[:, None] < 0, chance, known).astype(np.float32)
        return probs


def _circles(batch: int, nodes: int, rng: np.random.Generator) -> IntArray:
    """Return the successor [B, nodes] of each node on a random circle of all nodes."""
    order = rng.permuted(np.tile(np.arange(nodes), (batch, 1)), axis=1)
    following: IntArray = np.empty_like(order)
    np.put_along_axis(following, order, np.roll(order, -1, axis=1), axis=1)
    return following


SCENARIO = Scenario(
    GraphWalk,
    env_steps=200,
    recipes={
        "graph-walk": Recipe(
            GraphWalk,
            PolicyTrainConfig(rounds=90, batch=32, steps=200, span=20, lr=6e-3, keen=3.0, led=0.3),
            steps=200,
            slots=16,
            width=64,
            layer=64,
            identity=True,
            product=True,
        )
    },
    evaluation=ActingEvaluation(
        {"teacher, which sees the nodes": TeacherActor, "random": RandomActor}, curve_label="steps lost"
    ),
)
