"""The performance targets: the value of each in the results of a run, and the next limit of the value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.profiling import format_shares
from research.estimates import GeometricMeanEstimate, mean, ratio

Results = Mapping[str, Any]
Value = Callable[[Mapping[str, Any]], GeometricMeanEstimate]
Text = Callable[[Mapping[str, Any]], str]


class NotMeasuredError(Exception):
    """An error that says why the results lack a number."""


@dataclass(frozen=True)
class PerformanceTarget:
    """One performance target.

    what: name of the target
    least, aim: value that must be reached, and value that is aimed at
    value: computes the measured value from the results
    limit: describes the next limit from the results
    note: describes a further number from the results
    """

    what: str
    least: float
    aim: float
    higher_is_better: bool
    value: Value
    limit: Text
    note: Text = lambda results: ""

    def evaluate(self, results: Results) -> dict[str, Any]:
        """Return the target for JSON, with the measured value and whether it is reached for sure.

        `reached` is "aim", "least" or "no", with a question mark where the interval leaves the answer open.
        """
        limits = {"what": self.what, "least": self.least, "aim": self.aim, "up": self.higher_is_better}
        try:
            found = self.value(results)
        except NotMeasuredError as error:
            return limits | {"measured": None, "reached": f"not measured: {error}", "limit": ""}
        reached, goal = "no", self.least
        for name, value in (("least", self.least), ("aim", self.aim)):
            if self._meets(found.value, value):
                reached, goal = name, value
        # The end of the interval that would change the answer.
        bound = found.low if self.higher_is_better == (reached != "no") else found.high
        if bound is None or self._meets(bound, goal) != (reached != "no"):
            reached += "?"
        return limits | {
            "measured": asdict(found),
            "reached": reached,
            "limit": text_or_empty(self.limit, results),
            "note": text_or_empty(self.note, results),
        }

    def _meets(self, value: float, goal: float) -> bool:
        return value >= goal if self.higher_is_better else value <= goal


# --- finding numbers -------------------------------------------------------------------------------------------------


def measured_values(results: Results, scenario: str, arm: str, quantity: str) -> list[float]:
    """Return the values of a quantity, one for each round. Raises NotMeasuredError."""
    if scenario not in results["scenarios"]:
        raise NotMeasuredError("not part of this run")
    arms = results["scenarios"][scenario]["arms"]
    if arm not in arms or quantity not in arms[arm]:
        raise NotMeasuredError(results["missing"].get(arm, f"{arm} was not part of this run"))
    values: list[float] = arms[arm][quantity]
    return values


def ratio_of_arms(scenario: str, quantity: str, numerator: str, denominator: str) -> Value:
    """Return a function that computes the ratio of two arms in a quantity."""

    def found(results: Results) -> GeometricMeanEstimate:
        values = [measured_values(results, scenario, arm, quantity) for arm in (numerator, denominator)]
        rounds = min(map(len, values))
        return ratio(values[0][:rounds], values[1][:rounds])

    return found


def ratio_within_arm(scenario: str, arm: str, numerator: str, denominator: str) -> Value:
    """Return a function that computes the ratio of two quantities of one arm."""
    return lambda results: ratio(
        measured_values(results, scenario, arm, numerator), measured_values(results, scenario, arm, denominator)
    )


def last_arm(scenario: str, quantity: str, scale: float) -> Value:
    """Return a function that computes the scaled mean of a quantity of the last arm."""

    def found(results: Results) -> GeometricMeanEstimate:
        if scenario not in results["scenarios"]:
            raise NotMeasuredError("not part of this run")
        arm = list(results["scenarios"][scenario]["arms"])[-1]
        return mean([scale * value for value in measured_values(results, scenario, arm, quantity)])

    return found


def history_cost(results: Results) -> GeometricMeanEstimate:
    """Return the duration of a request after the longest history ÷ after the shortest."""
    if "history" not in results["scenarios"]:
        raise NotMeasuredError("not part of this run")
    first, *_, last = results["scenarios"]["history"]["arms"]
    return ratio_of_arms("history", "request_s", last, first)(results)


def roofline(results: Results) -> GeometricMeanEstimate:
    """Return the duration of a decoding step of one sequence ÷ the time to read the weights from memory."""
    about = results["about"]
    floor = about["weight_bytes"] / about["read_bytes_per_s"]
    return mean([seconds / floor for seconds in measured_values(results, "single", "off", "s_per_token")])


def only_on_gpu(value: Value) -> Value:
    """Return a function that raises NotMeasuredError on a CPU, and else computes the value."""

    def found(results: Results) -> GeometricMeanEstimate:
        if results["about"]["device"] != "cuda":
            raise NotMeasuredError("there was no GPU")
        return value(results)

    return found


# --- limits -----------------------------------------------------------------------------------------------------------


def step(name: str) -> Text:
    """Return a function that describes the profile of a step."""

    def found(results: Results) -> str:
        profile = results["profile"][name]
        return f"the step ({1000 * profile['seconds']:.1f} ms): {format_shares(profile['shares'])}"

    return found


def served_step(name: str, scenario: str, arm: str) -> Text:
    """Return a function that describes the profile of a step, and the share of a token's time outside of the step."""

    def found(results: Results) -> str:
        alone = results["profile"][name]["seconds"]
        served = mean(measured_values(results, scenario, arm, "s_per_token")).value
        outside = max(0.0, 1 - alone / served)
        return f"{step(name)(results)}; outside of it (sampling, HTTP, waiting) {outside:.0%} of a token"

    return found


def load_and_commit(results: Results) -> str:
    """Describe the loads and commits in the duration of a request."""
    scenario = results["scenarios"]["sessions"]
    requests = 5 / mean(measured_values(results, "sessions", "many", "requests_per_s")).value  # five clients at once
    load, commit = scenario["load_seconds"], scenario["commit_seconds"]
    return f"of a request's {1000 * requests:.0f} ms, {1000 * load:.1f} are loading and {1000 * commit:.1f} committing"


def block_and_step(results: Results) -> str:
    """Describe the block of a prompt that runs between two decoding steps."""
    block, decode = (results["profile"][name] for name in ("block, off", "decode 1, off"))
    first = f"between two steps ({1000 * decode['seconds']:.0f} ms for one stream) stands a block of the prompt"
    return f"{first}, {1000 * block['seconds']:.0f} ms: {format_shares(block['shares'], 2)}"


def load_breakdown(results: Results) -> str:
    """Describe the phases of a load and a commit of a full session."""
    arms = results["scenarios"]["states"]["arms"]
    full = arms[list(arms)[-1]]
    phases = {name: 1000 * mean(full[f"{name}_s"]).value for name in ("load", "place", "commit")}
    return ", ".join(f"{name} {ms:.1f} ms" for name, ms in phases.items())


def also_shown(label: str, value: Value) -> Text:
    """Return a function that formats a further value with a label."""
    return lambda results: f"{label} {value(results).value:.2f}"


def text_or_empty(text: Text, results: Results) -> str:
    """Return the text, or "" if the results lack a number that the text needs."""
    try:
        return text(results)
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
    *(
        PerformanceTarget(
            f"decode with a JSON Schema ÷ without, batch {count}", least, 1.02, False,
            ratio_of_arms(f"masked-{count}", "s_per_step", "masked", "plain"), step(f"decode {count}, off"),
        )
        for count, least in ((1, 1.05), (16, 1.10))
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
