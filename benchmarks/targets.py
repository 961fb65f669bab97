"""The rows to reach: how each is found in the results of a run, and what limits it next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.profiling import told
from research.estimates import GeometricMeanEstimate, mean, ratio

Results = Mapping[str, Any]


class NotMeasuredError(Exception):
    """There is no such number in these results; the message says why."""


@dataclass(frozen=True)
class PerformanceTarget:
    """One thing to reach. up: more is better. limit: what limits it next, from the same run."""

    what: str
    least: float
    aim: float
    higher_is_better: bool
    value: Callable[[Results], GeometricMeanEstimate]
    limit: Callable[[Results], str]
    note: Callable[[Results], str] = lambda results: ""

    def told(self, results: Results) -> dict[str, Any]:
        limits = {"what": self.what, "least": self.least, "aim": self.aim, "up": self.higher_is_better}
        try:
            found = self.value(results)
        except NotMeasuredError as error:
            return limits | {"measured": None, "reached": f"not measured: {error}", "limit": ""}
        reached, goal = next(
            (
                (word, goal)
                for word, goal in (("aim", self.aim), ("least", self.least))
                if self._meets(found.value, goal)
            ),
            ("no", self.least),
        )
        worse = found.low if self.higher_is_better == (reached != "no") else found.high  # where it might really be
        if worse is None or self._meets(worse, goal) != (reached != "no"):
            reached += "?"
        return limits | {
            "measured": asdict(found),
            "reached": reached,
            "limit": or_empty(self.limit, results),
            "note": or_empty(self.note, results),
        }

    def _meets(self, value: float, goal: float) -> bool:
        return value >= goal if self.higher_is_better else value <= goal


# --- finding numbers -------------------------------------------------------------------------------------------------


def measured_values(results: Results, scenario: str, arm: str, what: str) -> list[float]:
    """A measured column. Raises NotMeasuredError."""
    if scenario not in results["scenarios"]:
        raise NotMeasuredError("not part of this run")
    arms = results["scenarios"][scenario]["arms"]
    if arm not in arms or what not in arms[arm]:
        raise NotMeasuredError(results["missing"].get(arm, f"{arm} was not part of this run"))
    values: list[float] = arms[arm][what]
    return values


def ratio_of_arms(scenario: str, what: str, over: str, under: str) -> Callable[[Results], GeometricMeanEstimate]:
    """The ratio of two arms."""

    def found(results: Results) -> GeometricMeanEstimate:
        above, below = (measured_values(results, scenario, arm, what) for arm in (over, under))
        rounds = min(len(above), len(below))
        return ratio(above[:rounds], below[:rounds])

    return found


def ratio_within_arm(scenario: str, arm: str, over: str, under: str) -> Callable[[Results], GeometricMeanEstimate]:
    """The ratio of two things that were measured of one arm."""
    return lambda results: ratio(
        measured_values(results, scenario, arm, over), measured_values(results, scenario, arm, under)
    )


def last_arm(scenario: str, what: str, scale: float) -> Callable[[Results], GeometricMeanEstimate]:
    """What was measured of the scenario's last arm."""

    def found(results: Results) -> GeometricMeanEstimate:
        if scenario not in results["scenarios"]:
            raise NotMeasuredError("not part of this run")
        arm = list(results["scenarios"][scenario]["arms"])[-1]
        return mean([scale * value for value in measured_values(results, scenario, arm, what)])

    return found


def history_cost(results: Results) -> GeometricMeanEstimate:
    if "history" not in results["scenarios"]:
        raise NotMeasuredError("not part of this run")
    first, *_, last = results["scenarios"]["history"]["arms"]
    return ratio_of_arms("history", "request_s", last, first)(results)


def roofline(results: Results) -> GeometricMeanEstimate:
    """A decoding step of one sequence over the time that reading the weights takes."""
    about = results["about"]
    floor = about["weight_bytes"] / about["read_bytes_per_s"]
    return mean([seconds / floor for seconds in measured_values(results, "single", "off", "s_per_token")])


def only_on_gpu(value: Callable[[Results], GeometricMeanEstimate]) -> Callable[[Results], GeometricMeanEstimate]:
    def found(results: Results) -> GeometricMeanEstimate:
        if results["about"]["device"] != "cuda":
            raise NotMeasuredError("there was no GPU")
        return value(results)

    return found


# --- what limits next ------------------------------------------------------------------------------------------------


def step(name: str) -> Callable[[Results], str]:
    """Where the time of a profiled step goes."""

    def found(results: Results) -> str:
        one = results["profile"][name]
        return f"the step ({1000 * one['seconds']:.1f} ms): {told(one['shares'])}"

    return found


def served_step(name: str, scenario: str, arm: str) -> Callable[[Results], str]:
    """The same, and what the server adds to it."""

    def found(results: Results) -> str:
        alone, served = (
            results["profile"][name]["seconds"],
            mean(measured_values(results, scenario, arm, "s_per_token")).value,
        )
        outside = max(0.0, 1 - alone / served)
        return f"{step(name)(results)}; outside of it (sampling, HTTP, waiting) {outside:.0%} of a token"

    return found


def load_and_commit(results: Results) -> str:
    one = results["scenarios"]["sessions"]
    requests = 5 / mean(measured_values(results, "sessions", "many", "requests_per_s")).value  # five clients at once
    load, commit = one["load_seconds"], one["commit_seconds"]
    return f"of a request's {1000 * requests:.0f} ms, {1000 * load:.1f} are loading and {1000 * commit:.1f} committing"


def block_and_step(results: Results) -> str:
    block, decode = (results["profile"][name] for name in ("block, off", "decode 1, off"))
    first = f"between two steps ({1000 * decode['seconds']:.0f} ms for one stream) stands a block of the prompt"
    return f"{first}, {1000 * block['seconds']:.0f} ms: {told(block['shares'], 2)}"


def load_breakdown(results: Results) -> str:
    arms = results["scenarios"]["states"]["arms"]
    full = arms[list(arms)[-1]]
    parts = {what: 1000 * mean(full[f"{what}_s"]).value for what in ("load", "place", "commit")}
    return ", ".join(f"{what} {ms:.1f} ms" for what, ms in parts.items())


def also_shown(label: str, value: Callable[[Results], GeometricMeanEstimate]) -> Callable[[Results], str]:
    """Another number beside the row's."""
    return lambda results: f"{label} {value(results).value:.2f}"


def or_empty(told: Callable[[Results], str], results: Results) -> str:
    """What a part of the run says that may be missing."""
    try:
        return told(results)
    except (NotMeasuredError, KeyError):
        return ""


TARGETS = (
    *(
        PerformanceTarget(
            f"decode with memory on (predict) ÷ off, batch {count}", 1.07, 1.02, False,
            ratio_of_arms(f"batch-{count}", "s_per_step", "predict", "off"), step(f"decode {count}, predict"),
        )
        for count in (1, 16, 64)
    ),
    PerformanceTarget(
        "throughput kept from 5 to 2,000 sessions", 0.95, 0.99, True,
        ratio_of_arms("sessions", "requests_per_s", "many", "5"), load_and_commit,
    ),
    PerformanceTarget(
        "request cost after 1M learned tokens ÷ after 1K", 1.05, 1.00, False, history_cost,
        step("block, learned"),
    ),
    PerformanceTarget(
        "single-stream decode ÷ llama.cpp server (same GGUF)", 0.6, 1.0, True,
        ratio_of_arms("single", "s_per_token", "llama.cpp", "off"), served_step("decode 1, off", "single", "off"),
        also_shown("with memory", ratio_of_arms("single", "s_per_token", "llama.cpp", "both")),
    ),
    PerformanceTarget(
        "16 streams, total tokens/s ÷ llama.cpp server", 1.0, 1.6, True,
        ratio_of_arms("streams-16", "tokens_per_s", "off", "llama.cpp"), step("decode 16, off"),
        also_shown("with memory", ratio_of_arms("streams-16", "tokens_per_s", "both", "llama.cpp")),
    ),
    PerformanceTarget(
        "prefill tokens/s ÷ llama.cpp", 1.2, 1.5, True,
        ratio_of_arms("prefill", "tokens_per_s", "off", "llama.cpp"), step("block, off"),
        also_shown("learning it too", ratio_of_arms("prefill", "tokens_per_s", "both", "llama.cpp")),
    ),
    PerformanceTarget(
        "decode ÷ `transformers` generate, batch 1", 4.0, 6.0, True,
        ratio_of_arms("single", "s_per_token", "transformers", "off"), served_step("decode 1, off", "single", "off"),
        also_shown("with memory", ratio_of_arms("single", "s_per_token", "transformers", "both")),
    ),
    PerformanceTarget(
        "load + commit of a full session, embedded store, ms", 20.0, 5.0, False,
        last_arm("states", "load_and_commit_s", 1000), load_breakdown,
    ),
    PerformanceTarget(
        "p99 inter-token latency while 4K prompts arrive ÷ p50", 2.0, 1.3, False,
        ratio_within_arm("interruption", "off", "p99_s", "p50_s"), block_and_step,
        also_shown("÷ the p50 when nothing arrives", ratio_within_arm("interruption", "off", "p99_s", "quiet_p50_s")),
    ),
    PerformanceTarget(
        "GPU: decode step at batch 1 ÷ (weight bytes ÷ measured bandwidth)", 6.0, 3.0, False,
        only_on_gpu(roofline), lambda results: "",
    ),
    PerformanceTarget(
        "GPU: 256 streams, tokens/s with memory on ÷ off", 0.95, 0.99, True,
        only_on_gpu(ratio_of_arms("batch-256", "s_per_step", "off", "predict")), lambda results: "",
    ),
    PerformanceTarget(
        "GPU: against vLLM, 64 streams, same model and load", 1.0, 1.3, True,
        only_on_gpu(ratio_of_arms("streams-64", "tokens_per_s", "off", "vllm")), lambda results: "",
    ),
)  # fmt: skip
