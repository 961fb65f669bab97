"""`imprint scenario NAME`: a policy beside what else could be used, on the same tasks, seed by seed.

Rivals that learn to learn are trained here, on the policy's lessons, for as many seconds of one core as it was, or for
so many as are asked for.
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
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from model.memory import Pool
from model.policies.config import PolicyError
from model.policies.network import Policy, load_policy
from research.corpus import console
from research.estimates import half_width
from research.machine import hardware
from research.plots import PlotsMissingError, draw_curves
from research.scenarios.baselines import acting_baselines, function_stream, label_stream, offline_classifier
from research.scenarios.card_sorting import CardSorting
from research.scenarios.core import FloatArray, IntArray, Tasks
from research.scenarios.meta_baselines import BASELINES, BaselineTrainConfig, train_baseline, train_from_seed
from research.scenarios.recipes import Recipe
from research.scenarios.streams import FunctionStream, LabellingTasks
from research.training.agents import Agent, MemoryAgent
from research.training.policy_command import find_recipe
from research.training.policy_loop import sample_actions
from service.errors import CommandError

TASKS, STREAMS = 100, 10  # of each seed: tasks to act in, streams to label
TABLE, PRACTICE = 1_000_000, 2_000_000  # where seeds of the tables begin, and of tasks that settings are chosen by
NUM_PRACTICE_SEEDS = 2  # seeds of practice that tell which learning rate is the best
Measured = dict[str, float]
Curve = NDArray[np.float64]
Choose = Callable[[Tasks], IntArray]
Seeds = list[tuple[int, int]]


@dataclass(frozen=True)
class ArmResult:
    """What was measured of one way to play: a figure a seed, and the mean of each step over tasks and seeds."""

    name: str
    figures: Mapping[str, list[float]]
    curve: Curve
    note: str = ""
    trainings: list[float] | None = None  # the main figure of each training


def measure_scenario(
    name: str,
    out: Path,
    *,
    seeds: int,
    rivals: Sequence[str],
    baseline_config: BaselineTrainConfig,
    checkpoint: Path | None,
    practice: bool,
    options: Mapping[str, str],
) -> None:
    """Runs `imprint scenario`; rivals: of RIVALS; practice: on other seeds than the tables'. Raises CommandError."""
    recipe = find_recipe(name)
    if unknown := set(rivals) - set(BASELINES):
        raise CommandError(f"--rivals must be among {', '.join(BASELINES)}, or none, got {', '.join(sorted(unknown))}")
    try:
        changed = {option: json.loads(value) for option, value in options.items()}
        recipe = replace(recipe, options={**recipe.options, **changed})
        recipe.make(1, np.random.default_rng(0))
    except (ValueError, TypeError) as error:
        raise CommandError(f"--change {dict(options)}: {error}") from error
    torch.set_num_threads(1)
    drawn = _seeds(PRACTICE if practice else TABLE, seeds)
    policy, trained = _trained(name, checkpoint)
    if policy.config.task == "label":
        arms = _labelling(policy, recipe, drawn)
    else:
        arms = _acting(name, policy, recipe, drawn, rivals, baseline_config, trained)
    print_arms(name, arms)
    out.mkdir(parents=True, exist_ok=True)
    about = {"scenario": name, "options": dict(recipe.options), "seeds": seeds, "tasks": TASKS, "steps": recipe.steps}
    about |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware(), "seconds": trained}
    told = {arm.name: {**asdict(arm), "curve": arm.curve.tolist()} for arm in arms}
    name = "-".join([name, *(f"{option}-{value}" for option, value in options.items())])
    (out / f"{name}.json").write_text(json.dumps({"about": about, "arms": told}) + "\n")
    try:
        what = "squared error" if issubclass(recipe.tasks, FunctionStream) else "missed reward"
        draw_curves({arm.name: arm.curve for arm in arms}, recipe.steps // 20, out / f"{name}.png", what)
    except PlotsMissingError as error:
        console.print(f"no plot: {error}")


def interval(figures: list[float]) -> tuple[float, float]:
    """The mean over seeds and half the width of its 95% interval (0 of a single seed)."""
    return float(np.mean(figures)), half_width(figures) if len(figures) > 1 else 0.0


def print_arms(name: str, arms: list[ArmResult]) -> None:
    figures = list(arms[0].figures)
    table = Table(title=name, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("arm", *figures, ""):
        table.add_column(column, justify="left" if column in ("arm", "") else "right", overflow="fold")
    for arm in arms:
        cells = ["{:.3f} ± {:.3f}".format(*interval(arm.figures[one])) for one in figures]
        table.add_row(arm.name, *cells, arm.note)
    console.print(table)


def _trained(name: str, checkpoint: Path | None) -> tuple[Policy, float]:
    """The policy, and for how many seconds of one core it was trained."""
    try:
        if checkpoint is not None:
            return load_policy(checkpoint), _seconds(checkpoint)
        with as_file(files("model") / "checkpoints" / "policies") as folder:
            path = folder / f"{name}.safetensors"
            return load_policy(path), _seconds(path)
    except PolicyError as error:
        raise CommandError(str(error)) from error


def _seconds(path: Path) -> float:
    manifest = path.with_suffix(".json")
    return float(json.loads(manifest.read_text())["seconds"]) if manifest.exists() else 60.0


# --- acting --------------------------------------------------------------------------------------------------------


def _acting(
    name: str,
    policy: Policy,
    recipe: Recipe,
    seeds: Seeds,
    rivals: Sequence[str],
    baseline_config: BaselineTrainConfig,
    seconds: float,
) -> list[ArmResult]:
    greedy = policy.config.greedy
    size = sum(parameter.numel() for parameter in policy.parameters())

    def measure_arm(title: str, agents: Sequence[Agent], note: str = "") -> ArmResult:
        """What the first agent does, and the main figure of all."""
        arms = [
            _measure_arm(title, recipe, seeds, lambda agent=agent: _choose_with(agent, greedy), note)  # type: ignore[misc]
            for agent in agents
        ]
        if len(agents) == 1:
            return arms[0]
        trainings = [float(np.mean(_main(arm))) for arm in arms]
        told = f"{len(agents)} trainings: {', '.join(f'{figure:.3f}' for figure in trainings)}"
        return replace(arms[0], trainings=trainings, note=f"{note}; {told}")

    def evaluate(agent: Agent) -> float:
        practice = _seeds(PRACTICE, NUM_PRACTICE_SEEDS)
        return float(np.mean(_main(_measure_arm("", recipe, practice, lambda: _choose_with(agent, greedy)))))

    retrained = [train_from_seed(name, recipe, seed) for seed in range(1, baseline_config.trainings)]
    memory_agents: list[Agent] = [MemoryAgent(one, guarded=True) for one in (policy, *retrained)]
    arms = [
        measure_arm("memory", memory_agents, f"{size:,} parameters"),
        measure_arm("memory off", [MemoryAgent(policy, read_only=True)]),
    ]
    ways = acting_baselines(recipe.make(1, np.random.default_rng(0)))
    arms += [_measure_arm(way, recipe, seeds, make_choose) for way, make_choose in ways.items()]
    for baseline in rivals:
        trained = train_baseline(baseline, recipe, size, evaluate, baseline_config, baseline_config.seconds or seconds)
        arms.append(measure_arm(BASELINES[baseline], trained.agents, trained.note()))
    return arms


def _main(arm: ArmResult) -> list[float]:
    """Of each seed the figure that an arm is judged by; the lower the better."""
    return list(arm.figures["errors per switch" if "errors per switch" in arm.figures else "regret"])


def _seeds(first: int, count: int) -> Seeds:
    return [(first, seed) for seed in range(count)]


def _choose_with(agent: Agent, greedy: bool) -> Choose:
    """Plays as the agent says."""
    fresh = True

    def choose(tasks: Tasks) -> IntArray:
        nonlocal fresh
        if fresh:
            agent.reset(tasks.batch)
            fresh = False
        return sample_actions(agent.ask(torch.from_numpy(tasks.observe()))[0], tasks.rng, greedy=greedy)

    choose.tell = agent.tell  # type: ignore[attr-defined]
    return choose


@torch.no_grad()
def _measure_arm(
    name: str, recipe: Recipe, seeds: Seeds, make_choose: Callable[[], Choose], note: str = ""
) -> ArmResult:
    figures: dict[str, list[float]] = {}
    curves = []
    for seed in seeds:
        tasks = recipe.make(TASKS, np.random.default_rng(seed))
        choose, regrets, rewards, perseveration = make_choose(), [], [], _PerseverationCounter()
        for _ in range(recipe.steps):
            means, action = tasks.means(), choose(tasks)
            regrets.append(means.max(1) - means[np.arange(TASKS), action])
            perseveration.before(tasks, action, regrets[-1] > 0)
            reward = tasks.step(action)
            perseveration.after(tasks)
            rewards.append(reward)
            if hasattr(choose, "tell"):
                choose.tell(torch.from_numpy(action), torch.from_numpy(reward))
        regret, reward = np.stack(regrets, 1), np.stack(rewards, 1)
        for one, figure in _figures(tasks, regret, reward, perseveration).items():
            figures.setdefault(one, []).append(figure)
        curves.append(regret.mean(0))
    return ArmResult(name, figures, np.mean(curves, axis=0), note)


def _figures(tasks: Tasks, regret: FloatArray, reward: FloatArray, perseveration: _PerseverationCounter) -> Measured:
    if isinstance(tasks, CardSorting):
        share = perseveration.num_perseverative / max(1, perseveration.trials)
        return {"errors per switch": float(regret.sum() / tasks.switches.sum()), "perseverative": share}
    return {"reward": float(reward.sum(1).mean()), "regret": float(regret.sum(1).mean())}


class _PerseverationCounter:
    """Card sorting: of the trials after the first error that follows a switch, up to the next success, how many still
    follow the rule that was, and could have followed no other."""

    def __init__(self) -> None:
        self.trials, self.num_perseverative = 0, 0
        self._phase: IntArray | None = None

    def before(self, tasks: Tasks, action: IntArray, wrong: NDArray[np.bool_]) -> None:
        if not isinstance(tasks, CardSorting):
            return
        here = np.arange(tasks.batch)
        if self._phase is None:
            self._phase = np.zeros(tasks.batch, np.int64)
        previous_rule = tasks.previous_rule[here, tasks.deck]
        after = self._phase == 2
        self.trials += int(after.sum())
        correct = tasks.correct()[here, :, action]
        self.num_perseverative += int((after & wrong & correct[here, previous_rule] & (correct.sum(1) == 1)).sum())
        self._phase = np.where((self._phase == 1) & wrong, 2, np.where(after & ~wrong, 0, self._phase))

    def after(self, tasks: Tasks) -> None:
        if isinstance(tasks, CardSorting) and self._phase is not None:
            self._phase = np.where(tasks.switched, 1, self._phase)


# --- labelling -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _labelling(policy: Policy, recipe: Recipe, seeds: Seeds) -> list[ArmResult]:
    """Accuracy after 5 labels a class, and over the last quarter; of functions the error in their second 50 and over
    the last quarter."""
    T = recipe.steps
    found: dict[str, list[Curve]] = {}
    for seed in seeds:
        tasks = recipe.make(STREAMS, np.random.default_rng(seed))
        assert isinstance(tasks, LabellingTasks)
        wrong = (
            _value_errors(policy, tasks, T) if isinstance(tasks, FunctionStream) else _label_errors(policy, tasks, T)
        )
        for name, curve in wrong.items():
            found.setdefault(name, []).append(curve.mean(0))
    arms = []
    for name, curves in found.items():
        late = [float(curve[-T // 4 :].mean()) for curve in curves]
        if issubclass(recipe.tasks, FunctionStream):
            roots = {"of steps 51 to 100": [float(curve[50:100].mean()) for curve in curves], "last quarter": late}
            figures = {column: np.sqrt(means).tolist() for column, means in roots.items()}
        else:
            first = 5 * policy.config.actions
            early = [1 - float(curve[first : first + 10].mean()) for curve in curves]
            figures = {"after 5 a class": early, "last quarter": [1 - mean for mean in late]}
        arms.append(ArmResult(name, figures, np.mean(curves, axis=0)))
    return arms


def _label_errors(policy: Policy, tasks: LabellingTasks, steps: int) -> dict[str, Curve]:
    """Whether each label [B, T] was not foreseen."""
    features, told, _ = tasks.read(steps)
    streams = zip(features, told, strict=True)
    rights = {"memory": np.stack([_predicted_probs(policy, x, y).argmax(1) == y for x, y in streams])}
    rights |= label_stream(features, told, tasks.actions) | offline_classifier(tasks, features, told)
    return {name: 1.0 - correct for name, correct in rights.items()}


def _value_errors(policy: Policy, tasks: FunctionStream, steps: int) -> dict[str, Curve]:
    """The squared error [B, T] of what was foreseen of each value: the mean of the chances of its bins."""
    values = np.zeros((tasks.batch, steps))
    features = np.zeros((tasks.batch, steps, tasks.context), np.float32)
    labels = np.zeros(values.shape, np.int64)
    true = np.zeros(values.shape)
    for step in range(steps):
        features[:, step], values[:, step], labels[:, step] = tasks.observe(), tasks.values(), tasks.targets()
        true[:, step] = values[:, step] - tasks.noises
        tasks.step(labels[:, step])
    alone = policy.base(policy.embed(torch.from_numpy(features).flatten(0, 1))).logits.softmax(-1).numpy()
    streams = zip(features, labels, strict=True)
    said = {
        "memory": np.stack([_predicted_probs(policy, x, y) @ tasks.centres for x, y in streams]),
        "memory off": (alone @ tasks.centres).reshape(values.shape),
    }
    said |= function_stream(tasks, features, values) | {"who knows the function": true}
    return {name: (predicted - values) ** 2 for name, predicted in said.items()}


def _predicted_probs(policy: Policy, features: FloatArray, labels: IntArray) -> Curve:
    """The chances [T, L] of each label before it was told, as a server's session would give them."""
    pool = Pool(policy.config.memory, rows=4096, sessions=4)
    index, chances = pool.open(), []
    for example, label in zip(torch.from_numpy(features), torch.from_numpy(labels), strict=True):
        chances.append(policy.label(example[None], pool, torch.tensor([index]))[0].exp().numpy())
        draft = pool.draft(index)
        ((*_, learn),) = policy.label_updates(example[None], label[None], pool, torch.tensor([draft.index]))
        learn(draft)
        draft.commit()
    return np.stack(chances).astype(np.float64)
