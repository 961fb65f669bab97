"""lm-eval: two small tasks by `local-completions` have the results of `transformers` on the same base."""

# /// script
# dependencies = ["lm-eval[api]", "accelerate"]
# [tool.imprint]
# with-server-packages = true
# ///

import json
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 512
TASKS = {
    "next_words": """
task: next_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "pages": """
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pages.json}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""",
}


def _write_tasks(folder: Path) -> None:
    """Write the tasks and their data: which words go on, of four, and whole paragraphs, of this project's pages."""
    texts = [file.read_text() for file in sorted((ROOT / "examples").glob("*.txt"))]
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part) > 200][:32]
    halves = [(part[: len(part) // 2].rpartition(" ")[0], part) for part in paragraphs]
    endings = [" " + " ".join(part[len(before) :].split()[:6]) for before, part in halves]
    words = [
        {"before": before, "choices": [endings[(i + j) % len(endings)] for j in range(4)], "answer": 0}
        for i, (before, _) in enumerate(halves)
    ]
    (folder / "words.json").write_text("\n".join(map(json.dumps, words)))
    (folder / "pages.json").write_text("\n".join(json.dumps({"text": part}) for part in paragraphs))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))


def _results(model: str, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=manager,
        batch_size=8,
        device="cpu",
        bootstrap_iters=200,
    )
    return {name: found["results"][name] for name in TASKS}


def check_two_tasks_have_the_results_of_transformers(url: str, model: str) -> None:
    from service.base_cache import resolve_base
    from service.settings import Settings

    base = str(resolve_base(model, Settings().cache_dir, progress=print))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_tasks(folder)
        completions = {"base_url": f"{url}/v1/completions", "model": model, "tokenizer": base, "max_length": CONTEXT}
        ours = _results("local-completions", completions | {"num_concurrent": 2, "tokenized_requests": True}, folder)
        theirs = _results("hf", {"pretrained": base, "max_length": CONTEXT, "dtype": "float32"}, folder)
    print(json.dumps({"imprint": ours, "transformers": theirs}, default=str))
    for task in TASKS:
        for metric, value in theirs[task].items():
            error = theirs[task].get(metric.replace(",", "_stderr,"))
            if isinstance(value, float) and "stderr" not in metric:
                bound = error if isinstance(error, float) and error > 0 else 0.001 * abs(value)
                assert abs(ours[task][metric] - value) <= bound, (task, metric, ours[task][metric], value, bound)
