"""Scenarios are valid environments, their teachers and optimal baselines are correct, and one description is enough."""

from __future__ import annotations

from importlib.resources import as_file, files

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from model.policies.network import load_policy, new_policy
from research.scenarios import BernoulliBandit, CardSorting, FunctionStream, LabelStream, Tasks, command
from research.scenarios.any_stream import AnyArms, predict_any_labels, predict_any_numbers
from research.scenarios.baselines import RandomActor, TeacherActor
from research.scenarios.bernoulli_bandit import gittins, gittins_table
from research.scenarios.core import Actor, FloatArray, IntArray
from research.scenarios.graph_walk import GraphWalk
from research.scenarios.label_stream import load_digit_images
from research.scenarios.maze import Maze
from research.scenarios.measures import ActingEvaluation
from research.scenarios.meta_baselines import BaselineTrainConfig
from research.scenarios.registry import RECIPES, SCENARIOS, scenario_of
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario
from research.training.agents import MemoryAgent


class Coin(Tasks):
    """A world for these tests: one of two actions always pays."""

    actions = 2

    def __init__(self, batch: int, rng: np.random.Generator) -> None:
        super().__init__(batch, rng)
        self.side = rng.integers(2, size=batch)

    def observe(self) -> FloatArray:
        return np.zeros((self.batch, 0), np.float32)

    def step(self, actions: IntArray) -> FloatArray:
        reward: FloatArray = (actions == self.side).astype(np.float32)
        return reward

    def means(self) -> FloatArray:
        return np.eye(2, dtype=np.float32)[self.side]


@pytest.mark.parametrize("env_id", [scenario.env_id for scenario in SCENARIOS])
@pytest.mark.filterwarnings("ignore:.*(minimum|maximum) value is")  # observations have no bounds of their own
def test_each_scenario_is_an_environment_that_a_seed_repeats(env_id: str) -> None:
    env = gymnasium.make(env_id)
    check_env(env.unwrapped, skip_render_check=True)
    episodes = []
    for _ in range(2):
        observation, _ = env.reset(seed=5)
        episode = [observation.tolist()]
        for step in range(5):
            observation, reward, _, _, info = env.step(step % 2)
            episode.append([*observation.tolist(), float(reward), info["regret"]])
        episodes.append(episode)
    assert episodes[0] == episodes[1]


def test_an_environment_ends_after_its_steps_and_refuses_an_invalid_action() -> None:
    env = gymnasium.make("imprint/CardSorting-v0", steps=3, dims=6).unwrapped
    env.reset(seed=0)
    assert [env.step(np.int64(0))[3] for _ in range(3)] == [False, False, True]
    with pytest.raises(ValueError, match=r"action must be in 0\.\.3, got 9"):
        env.step(np.int64(9))


@pytest.mark.parametrize("options", [{}, {"dims": 8}, {"together": 2, "dims": 6}, {"decks": 4}])
def test_the_correct_pile_follows_the_rule_of_the_deck(options: dict[str, int]) -> None:
    tasks = CardSorting(20, np.random.default_rng(0), hazard=0.2, **options)
    seen_switches = 0
    for _ in range(60):
        rules, decks = tasks.rule.copy(), tasks.deck.copy()
        shown = tasks.observe()[:, tasks.context :].reshape(20, 4, tasks.dims)
        action = tasks.rng.integers(4, size=20)
        dims = tasks.rules[rules[np.arange(20), decks]]
        correct = np.take_along_axis(shown[np.arange(20), action], dims, axis=1).all(1)
        assert np.array_equal(tasks.step(action), correct.astype(np.float32))
        seen_switches += int((tasks.rule != rules).sum())
    assert seen_switches == tasks.switches.sum() > 100


def test_gittins_indices_equal_the_published_table() -> None:
    """Gittins, Glazebrook & Weber (2011), table 8.4: Beta(α, β) arms, discount 0.9."""
    table = gittins_table(0.9)
    for ones, zeros, index in ((0, 0, 0.7029), (1, 0, 0.8001), (0, 1, 0.5001), (1, 1, 0.6346)):
        assert table[ones + zeros, ones] == pytest.approx(index, abs=0.004)
    near, far = (gittins(np.array([3.0]), np.array([3.0]), discount)[0] for discount in (0.9, 0.99))
    assert 0.5 < near < far < 1


def test_the_gittins_index_earns_more_than_chance_and_than_the_best_looking_arm() -> None:
    def total_reward(index: bool) -> float:
        tasks, total = BernoulliBandit(200, np.random.default_rng(1), arms=5, horizon=100), 0.0
        for _ in range(100):
            means = (tasks.counts[..., 1] + 1) / (tasks.counts.sum(-1) + 2)
            scores = tasks.teacher_scores() if index else means
            total += float(tasks.step((scores + 1e-6 * tasks.rng.random(scores.shape)).argmax(1)).mean())
        return total

    assert total_reward(index=True) > total_reward(index=False) + 1 > 70


@pytest.mark.parametrize("world", [Maze, GraphWalk])
def test_the_best_action_leads_to_the_goal_by_the_shortest_way(world: type[Maze | GraphWalk]) -> None:
    """The regret of a walk is its number of steps beyond those of the shortest ways."""
    tasks = world(50, np.random.default_rng(0), moves=0.5)
    found = np.zeros(50)
    for _ in range(200):
        means = tasks.means()
        before, best = -means.max(1), means.argmax(1)
        reward = tasks.step(best)
        left = -tasks.means().max(1)
        assert ((reward == 1) == (before == 1)).all(), "one step before the goal, the best action enters it"
        assert (reward.astype(bool) | (left == before - 1)).all()
        found += reward
    assert found.min() > 20


@pytest.mark.parametrize("world", [Maze, GraphWalk])
def test_a_teacher_who_does_not_know_the_walk_learns_it(world: type[Tasks]) -> None:
    def rewards(actor: Actor) -> FloatArray:
        tasks = world(100, np.random.default_rng(0))
        return np.stack([tasks.step(actor.act(tasks)) for _ in range(200)])

    teacher, random = rewards(TeacherActor()), rewards(RandomActor())
    assert teacher.sum() > 2.5 * random.sum()
    assert teacher[-50:].mean() > 1.2 * teacher[:20].mean()


@pytest.mark.parametrize("name", ["maze", "graph-walk"])
def test_a_shipped_policy_learns_its_way_within_one_walk(name: str) -> None:
    """A session that learns earns more than the slow weights alone, and more later than at first."""
    with as_file(files("model") / "checkpoints" / "policies" / f"{name}.safetensors") as path:
        policy = load_policy(path)

    def rewards(read_only: bool) -> FloatArray:
        tasks = RECIPES[name].make(100, np.random.default_rng(5))
        actor = command.AgentActor(MemoryAgent(policy, read_only=read_only, guarded=True), greedy=policy.config.greedy)
        steps = []
        with torch.no_grad():
            for _ in range(100):
                actions = actor.act(tasks)
                steps.append(tasks.step(actions))
                actor.learn(actions, steps[-1])
        return np.stack(steps)

    learning, frozen = rewards(False), rewards(True)
    assert learning.sum() > 1.3 * frozen.sum()
    assert learning[20:].mean() > learning[:20].mean()


def test_nodes_of_a_graph_look_alike_and_walls_of_a_maze_are_seen() -> None:
    graph = GraphWalk(20, np.random.default_rng(0))
    assert graph.observe().sum() == 20 and (np.sort(graph.colour, 1) == np.repeat(np.arange(3), 2)).all()
    maze = Maze(20, np.random.default_rng(0))
    for move in range(4):
        walls, cells = maze.observe()[:, -4:], maze.state.copy()
        rewards = maze.step(np.full(20, move))
        stays = rewards == 0
        assert ((maze.state == cells) == (walls[:, move] == 1))[stays].all()


def test_labels_are_permuted_in_each_task_and_drift_in_pairs() -> None:
    tasks = LabelStream(8, np.random.default_rng(0), drift=0.5)
    assert len({tuple(labels) for labels in tasks.labels.tolist()}) > 4
    before = tasks.labels.copy()
    tasks.step(tasks.targets())
    assert {int(moved) for moved in (tasks.labels != before).sum(1)} == {0, 2}
    held, trained = (np.concatenate(load_digit_images(held_out)) for held_out in (True, False))
    assert len(held) + len(trained) == 1797
    assert not {image.tobytes() for image in held} & {image.tobytes() for image in trained}


def test_functions_stay_within_their_bins() -> None:
    tasks: Tasks = FunctionStream(50, np.random.default_rng(0), moves=0.1)
    for _ in range(20):
        assert isinstance(tasks, FunctionStream)
        targets = tasks.targets()
        assert targets.min() >= 0 and targets.max() < tasks.actions
        assert np.abs(tasks.values()).max() < 1.2
        assert (tasks.step(targets) == 1).all()


def test_every_recipe_belongs_to_one_scenario_and_to_its_world() -> None:
    assert len({scenario.env_id for scenario in SCENARIOS}) == len(SCENARIOS)
    assert sum(len(scenario.recipes) for scenario in SCENARIOS) == len(RECIPES)
    assert all(recipe.tasks is scenario_of(name).tasks for name, recipe in RECIPES.items())


def test_a_description_is_enough_to_measure_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(Coin, PolicyTrainConfig(rounds=1), steps=12, identity=True, by_action=True)
    evaluation = ActingEvaluation({"random": RandomActor})
    assert Scenario(Coin, 12, {"coin": recipe}, evaluation).env_id == "imprint/Coin-v0"
    monkeypatch.setattr(command, "TASKS", 50)
    policy = new_policy(recipe.config("coin"), seed=0)
    arms = command.ActingComparison("coin", policy, recipe, evaluation, [(1, 0)]).measure([], BaselineTrainConfig(), 1)
    assert [arm.name for arm in arms] == ["memory", "memory off", "`bandit`", "random"]
    for arm in arms:
        assert arm.figures["reward"][0] + arm.figures["regret"][0] == pytest.approx(12)


def test_the_learners_of_any_stream_play_scenarios_without_training() -> None:
    tasks = CardSorting(20, np.random.default_rng(0), hazard=0.0, together=2, dims=4)  # piles differ by features alone
    actor, wrong = AnyArms(), []
    for _ in range(120):
        means, actions = tasks.means(), actor.act(tasks)
        wrong.append(means.max(1) - means[np.arange(20), actions])
        actor.learn(actions, tasks.step(actions))
    assert np.mean(wrong[60:]) < 0.6 * np.mean(wrong[:10])
    features, labels, _ = LabelStream(1, np.random.default_rng(1), ways=3).read(40)
    probs = predict_any_labels(features[0], labels[0], 3)
    _, first = np.unique(labels[0], return_index=True)
    assert (probs[first, labels[0, first]] == 0).all()  # a label is predicted before it is learned
    assert (probs.argmax(1) == labels[0])[20:].mean() > 0.8
    x = np.linspace(-1, 1, 60, dtype=np.float32)[np.random.default_rng(2).permutation(60), None]
    line = 3.0 * x[:, 0].astype(np.float64) + 1
    assert np.abs(predict_any_numbers(x, line) - line)[30:].mean() < 0.3
