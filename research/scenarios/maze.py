"""The maze: find a goal that is not seen in a maze that is not known, go back to it, and notice when it has moved."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research.scenarios.baselines import RandomActor, TeacherActor
from research.scenarios.core import FloatArray, IntArray
from research.scenarios.measures import ActingEvaluation
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario
from research.scenarios.walks import GoalTasks, steps_after

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left


class Maze(GoalTasks):
    """A square maze. Entering the goal pays 1 and puts the agent into a random cell; any other step pays 0.

    The agent sees the row and the column of its cell, and the walls around it. It walks against a wall in place. The
    maze is a random spanning tree of the cells; each other wall is left out with probability `open`. moves: probability
    that a goal which was found moves to another cell.
    """

    actions = 4

    def __init__(
        self, batch: int, rng: np.random.Generator, *, side: int = 3, open: float = 0.3, moves: float = 0.1
    ) -> None:
        super().__init__(batch, rng, moves)
        self.side, self.cells = side, side * side
        self.context = 2 * side + 4
        passages = np.stack([_passages(side, open, rng) for _ in range(batch)])
        self.walls = ~passages
        self.begin(np.where(passages, _neighbours(side), np.arange(self.cells)[:, None]))
        self.seen = np.zeros((batch, self.cells), bool)
        self._look()

    def observe(self) -> FloatArray:
        row, column = np.divmod(self.state, self.side)
        walls = self.walls[np.arange(self.batch), self.state]
        return np.concatenate([np.eye(self.side)[row], np.eye(self.side)[column], walls], 1).astype(np.float32)

    def step(self, actions: IntArray) -> FloatArray:
        reward = super().step(actions)
        self._look()
        return reward

    def teacher_scores(self) -> FloatArray:
        """Return minus the steps [B, 4] to where the goal was last found, or else to the nearest cell that is open.

        Walls that no one has seen count as passages.
        """
        known = self.seen[:, :, None] & self.walls
        passable = np.where(known, np.arange(self.cells)[:, None], _neighbours(self.side))
        wanted = self.wanted()
        wanted |= ~wanted.any(1, keepdims=True)
        return -steps_after(passable, self.state, wanted)

    def expected_rewards(self) -> FloatArray:
        """Return the probability [B, 4] that an action enters the goal."""
        following = self.next[np.arange(self.batch), self.state]
        open_ = ~self.missed[np.arange(self.batch)[:, None], following]
        chance = open_ / np.maximum(1, (~self.missed).sum(1, keepdims=True))
        known = (1 - self.moves) * (following == self.believed[:, None])
        probs: FloatArray = np.where(self.believed[:, None] < 0, chance, known).astype(np.float32)
        return probs

    def _look(self) -> None:
        self.seen[np.arange(self.batch), self.state] = True


def _neighbours(side: int) -> IntArray:
    """Return the cell [cells, 4] beside each cell, the cell itself where the edge is."""
    row, column = np.divmod(np.arange(side * side), side)
    beside = []
    for down, right in MOVES:
        inside = (row + down >= 0) & (row + down < side) & (column + right >= 0) & (column + right < side)
        beside.append(np.where(inside, (row + down) * side + column + right, np.arange(side * side)))
    return np.stack(beside, 1)


def _passages(side: int, open: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return whether there is a passage [cells, 4] from each cell in each direction."""
    beside, cells = _neighbours(side), side * side
    edges = [(a, move) for a in range(cells) for move in (1, 2) if beside[a, move] != a]
    passages, parts = np.zeros((cells, 4), bool), np.arange(cells)
    for edge in rng.permutation(len(edges)):
        a, move = edges[edge]
        b = beside[a, move]
        if parts[a] != parts[b] or rng.random() < open:
            parts[parts == parts[b]] = parts[a]
            passages[a, move] = passages[b, (move + 2) % 4] = True
    return passages


SCENARIO = Scenario(
    Maze,
    env_steps=200,
    recipes={
        "maze": Recipe(
            Maze,
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
        {"teacher, which remembers all walls": TeacherActor, "random": RandomActor}, curve_label="steps lost"
    ),
)
