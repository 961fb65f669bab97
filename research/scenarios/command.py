"""`imprint scenario NAME`: measures a policy beside its baselines on the same tasks, seed by seed.

Meta-learned baselines are trained here, on the policy's tasks, for as many seconds of one core as the policy was, or
for `--seconds`. What is measured is in the scenario's description (`research.scenarios.scenario`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.table import Table

from model.policies.config import PolicyError
from model.policies.network import Policy, load_policy
from research.corpus import console
from research.estimates import half_width
from research.machine import hardware
from research.plots import PlotsMissingError, draw_curves
from research.scenarios.any_stream import AnyArms
from research.scenarios.core import Actor, Curve, IntArray, LabellingTasks, Tasks
from research.scenarios.measures import ActingEvaluation, ActingMetrics, LabellingEvaluation
from research.scenarios.meta_baselines import META_BASELINES, BaselineTrainConfig, train_baseline, train_from_seed
from research.scenarios.registry import scenario_of
from research.scenarios.scenario import Recipe
from research.training.agents import Agent, MemoryAgent
from research.training.policy_command import find_recipe
from research.training.policy_loop import sample_actions
from service.errors import CommandError

TASKS, STREAMS = 100, 10  # for each seed: tasks to act in, streams to label
TABLE, PRACTICE = 1_000_000, 2_000_000  # first parts of the seeds of the tables, and of tasks to choose settings by
NUM_PRACTICE_SEEDS = 2  # practice seeds that a learning rate is chosen by
SECONDS_WITHOUT_MANIFEST = 60.0
Seeds = list[tuple[int, int]]


@dataclass(frozen=True)
class ArmResult:
    """The result of one arm.

    figures: for each figure a value for each seed. curve: the mean of each step over tasks and seeds. note: a remark
    for the table. trainings: the main figure of each training, of an arm that was trained several times.
    """

    name: str
    figures: Mapping[str, list[float]]
    curve: Curve
    note: str = ""
    trainings: list[float] | None = None


def measure_scenario(
    name: str,
    out: Path,
    *,
    seeds: int,
    baselines: Sequence[str],
    baseline_config: BaselineTrainConfig,
    checkpoint: Path | None,
    practice: bool,
    options: Mapping[str, str],
) -> None:
    """Run `imprint scenario` and write the results into the folder `out`.

    baselines: names of META_BASELINES. checkpoint: a policy file instead of the shipped one. practice: whether to use
    other seeds than the tables'. options: changed options of the world, as JSON. Raises CommandError.
    """
    recipe = find_recipe(name)
    if unknown := set(baselines) - set(META_BASELINES):
        names, wrong = ", ".join(META_BASELINES), ", ".join(sorted(unknown))
        raise CommandError(f"--rivals must be among {names}, or none, got {wrong}")
    try:
        changed = {option: json.loads(value) for option, value in options.items()}
        recipe = replace(recipe, options={**recipe.options, **changed})
        recipe.make(1, np.random.default_rng(0))
    except (ValueError, TypeError) as error:
        raise CommandError(f"--change {dict(options)}: {error}") from error
    torch.set_num_threads(1)
    drawn = _seeds(PRACTICE if practice else TABLE, seeds)
    policy, trained_s = _load_with_training_time(name, checkpoint)
    evaluation = scenario_of(name).evaluation
    if isinstance(evaluation, LabellingEvaluation):
        arms = _measure_labelling(evaluation, policy, recipe, drawn)
    else:
        comparison = ActingComparison(name, policy, recipe, evaluation, drawn)
        arms = comparison.measure(baselines, baseline_config, trained_s)
    print_arms(name, arms)
    out.mkdir(parents=True, exist_ok=True)
    about = {"scenario": name, "options": dict(recipe.options), "seeds": seeds, "tasks": TASKS, "steps": recipe.steps}
    about |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware(), "seconds": trained_s}
    stem = "-".join([name, *(f"{option}-{value}" for option, value in options.items())])
    _write_results(out / f"{stem}.json", about, arms)
    try:
        curves = {arm.name: arm.curve for arm in arms}
        draw_curves(curves, recipe.steps // 20, out / f"{stem}.png", evaluation.curve_label)
    except PlotsMissingError as error:
        console.print(f"no plot: {error}")


def _write_results(path: Path, about: Mapping[str, object], arms: list[ArmResult]) -> None:
    arms_by_name = {arm.name: {**asdict(arm), "curve": arm.curve.tolist()} for arm in arms}
    path.write_text(json.dumps({"about": about, "arms": arms_by_name}) + "\n")


def interval(figures: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and half the width of its 95% confidence interval (0 for a single seed)."""
    return float(np.mean(figures)), half_width(figures) if len(figures) > 1 else 0.0


def print_arms(name: str, arms: list[ArmResult]) -> None:
    """Print a table of the arms' figures, with confidence intervals."""
    figures = list(arms[0].figures)
    table = Table(title=name, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("arm", *figures, ""):
        table.add_column(column, justify="left" if column in ("arm", "") else "right", overflow="fold")
    for arm in arms:
        cells = ["{:.3f} ± {:.3f}".format(*interval(arm.figures[figure])) for figure in figures]
        table.add_row(arm.name, *cells, arm.note)
    console.print(table)


def _load_with_training_time(name: str, checkpoint: Path | None) -> tuple[Policy, float]:
    """Return the policy, and the seconds of one core that it was trained for."""
    try:
        if checkpoint is not None:
            return load_policy(checkpoint), _training_seconds(checkpoint)
        with as_file(files("model") / "checkpoints" / "policies") as folder:
            path = folder / f"{name}.safetensors"
            return load_policy(path), _training_seconds(path)
    except PolicyError as error:
        raise CommandError(str(error)) from error


def _training_seconds(path: Path) -> float:
    manifest = path.with_suffix(".json")
    return float(json.loads(manifest.read_text())["seconds"]) if manifest.exists() else SECONDS_WITHOUT_MANIFEST


def _seeds(first: int, count: int) -> Seeds:
    return [(first, seed) for seed in range(count)]


# --- acting --------------------------------------------------------------------------------------------------------


class AgentActor(Actor):
    """An agent as an actor: samples actions from the agent's logits, or takes the best if greedy."""

    def __init__(self, agent: Agent, *, greedy: bool) -> None:
        self._agent, self._greedy = agent, greedy
        self._is_reset = False

    def act(self, tasks: Tasks) -> IntArray:
        if not self._is_reset:
            self._agent.reset(tasks.batch)
            self._is_reset = True
        logits, _ = self._agent.ask(torch.from_numpy(tasks.observe()))
        return sample_actions(logits, tasks.rng, greedy=self._greedy)

    def learn(self, actions: IntArray, rewards: np.ndarray) -> None:
        self._agent.tell(torch.from_numpy(actions), torch.from_numpy(rewards))


class ActingComparison:
    """Measures a policy that acts beside its baselines, on the same tasks."""

    def __init__(self, name: str, policy: Policy, recipe: Recipe, evaluation: ActingEvaluation, seeds: Seeds) -> None:
        self._name, self._policy, self._recipe, self._evaluation, self._seeds = name, policy, recipe, evaluation, seeds

    def measure(
        self, baselines: Sequence[str], baseline_config: BaselineTrainConfig, trained_s: float
    ) -> list[ArmResult]:
        """Return the policy, it without memory, `bandit`, the scenario's baselines and the meta-learned `baselines`.

        trained_s: training time of a meta-learned baseline, where `baseline_config` sets none.
        """
        size = sum(parameter.numel() for parameter in self._policy.parameters())
        retrained = [train_from_seed(self._name, self._recipe, seed) for seed in range(1, baseline_config.trainings)]
        memory_agents = [MemoryAgent(policy, guarded=True) for policy in (self._policy, *retrained)]
        arms = [
            self._agents_arm("memory", memory_agents, f"{size:,} parameters"),
            self._agents_arm("memory off", [MemoryAgent(self._policy, read_only=True)], ""),
        ]
        for title, make_actor in {"`bandit`": AnyArms, **self._evaluation.baselines}.items():
            arms.append(_measure_acting(title, self._recipe, self._evaluation.metrics, self._seeds, make_actor))
        seconds = baseline_config.seconds or trained_s
        for baseline in baselines:
            trained = train_baseline(baseline, self._recipe, size, self._practice_figure, baseline_config, seconds)
            arms.append(self._agents_arm(META_BASELINES[baseline], trained.agents, trained.note()))
        return arms

    def _agents_arm(self, title: str, agents: Sequence[Agent], note: str) -> ArmResult:
        """Return the first agent's result, with the main figure of all agents when there are several."""
        arms = [self._agent_arm(title, agent, self._seeds, note) for agent in agents]
        if len(agents) == 1:
            return arms[0]
        trainings = [self._main_figure(arm) for arm in arms]
        suffix = f"{len(agents)} trainings: {', '.join(f'{figure:.3f}' for figure in trainings)}"
        return replace(arms[0], trainings=trainings, note=f"{note}; {suffix}")

    def _agent_arm(self, title: str, agent: Agent, seeds: Seeds, note: str) -> ArmResult:
        def make_actor() -> Actor:
            return AgentActor(agent, greedy=self._policy.config.greedy)

        return _measure_acting(title, self._recipe, self._evaluation.metrics, seeds, make_actor, note)

    def _practice_figure(self, agent: Agent) -> float:
        """Return the main figure of an agent on practice tasks, which no table shows; lower is better."""
        return self._main_figure(self._agent_arm("", agent, _seeds(PRACTICE, NUM_PRACTICE_SEEDS), ""))

    def _main_figure(self, arm: ArmResult) -> float:
        return float(np.mean(arm.figures[self._evaluation.metrics.main]))


@torch.no_grad()
def _measure_acting(
    title: str,
    recipe: Recipe,
    metrics_type: type[ActingMetrics],
    seeds: Seeds,
    make_actor: Callable[[], Actor],
    note: str = "",
) -> ArmResult:
    figures: dict[str, list[float]] = {}
    curves = []
    for seed in seeds:
        tasks = recipe.make(TASKS, np.random.default_rng(seed))
        actor, metrics = make_actor(), metrics_type()
        regrets, rewards = [], []
        for _ in range(recipe.steps):
            means, actions = tasks.means(), actor.act(tasks)
            regrets.append(means.max(1) - means[np.arange(TASKS), actions])
            metrics.before_step(tasks, actions, regrets[-1] > 0)
            rewards.append(tasks.step(actions))
            metrics.after_step(tasks)
            actor.learn(actions, rewards[-1])
        regret = np.stack(regrets, 1)
        for name, figure in metrics.figures(tasks, regret, np.stack(rewards, 1)).items():
            figures.setdefault(name, []).append(figure)
        curves.append(regret.mean(0))
    return ArmResult(title, figures, np.mean(curves, axis=0), note)


# --- labelling -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure_labelling(
    evaluation: LabellingEvaluation, policy: Policy, recipe: Recipe, seeds: Seeds
) -> list[ArmResult]:
    curves_by_arm: dict[str, list[Curve]] = {}
    for seed in seeds:
        tasks = recipe.make(STREAMS, np.random.default_rng(seed))
        assert isinstance(tasks, LabellingTasks)
        for name, errors in evaluation.errors(policy, tasks, recipe.steps).items():
            curves_by_arm.setdefault(name, []).append(errors.mean(0))
    return [
        ArmResult(name, evaluation.figures(curves, policy.config.actions), np.mean(curves, axis=0))
        for name, curves in curves_by_arm.items()
    ]
