"""guidellm: benchmarks of chats, of completions and of Responses run to their end."""

# /// script
# dependencies = ["guidellm"]
# [tool.imprint]
# with-server-packages = true
# ///

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REQUESTS = 4
SITE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _benchmark(url: str, model: str, route: str) -> None:
    from service.base_cache import resolve_base
    from service.settings import Settings

    base = resolve_base(model, Settings().cache_dir, progress=print)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(str(Path(sys.executable).parent / "guidellm"), "run", "--disable-progress"),
            *("--backend", f"kind=openai_http,target={url},model={model},request_format={route}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={base}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
            *("--output", f"kind=json,path={report}"),
        ]
        done = subprocess.run(command, env=os.environ | SITE, capture_output=True, text=True, timeout=600, cwd=folder)
        assert done.returncode == 0, (done.stderr or done.stdout)[-600:]
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    counts = benchmark["metrics"]["request_totals"]
    assert counts["successful"] >= REQUESTS and not counts["errored"], counts


def check_completions_run_to_their_end(url: str, model: str) -> None:
    _benchmark(url, model, "/v1/completions")


def check_chats_run_to_their_end(url: str, model: str) -> None:
    _benchmark(url, model, "/v1/chat/completions")


def check_responses_run_to_their_end(url: str, model: str) -> None:
    _benchmark(url, model, "/v1/responses")
