"""vLLM: `vllm bench serve` of completions, chats, Responses and embeddings runs to its end."""

# /// script
# dependencies = [
#   "aiohttp", "anthropic", "apache-tvm-ffi", "blake3", "cachetools", "cbor2", "cloudpickle", "datasets", "einops",
#   "ijson", "lark", "mcp", "mistral_common", "msgspec", "openai", "opentelemetry-sdk", "orjson", "oss-harmony",
#   "pandas", "partial-json-parser", "pillow", "prometheus-fastapi-instrumentator", "psutil", "py-cpuinfo", "pybase64",
#   "python-json-logger", "pyzmq", "requests", "sentencepiece", "setproctitle", "tiktoken", "tqdm", "watchfiles",
# ]
# [tool.imprint]
# with-server-packages = true
# without-dependencies = ["vllm", "xgrammar"]
# ///

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REQUESTS = 8
SITE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def _benchmark(url: str, model: str, backend: str, endpoint: str) -> None:
    from service.base_cache import resolve_base
    from service.settings import Settings

    base = resolve_base(model, Settings().cache_dir, progress=print)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", backend),
            *("--base-url", url, "--endpoint", endpoint, "--model", model, "--tokenizer", str(base)),
            *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16"),
            *("--num-prompts", str(REQUESTS), "--max-concurrency", "4", "--ignore-eos", "--disable-tqdm"),
            *("--save-result", "--result-dir", folder, "--result-filename", "report.json"),
        ]
        done = subprocess.run(command, env=os.environ | SITE, capture_output=True, text=True, timeout=600, cwd=folder)
        assert done.returncode == 0, (done.stderr or done.stdout)[-600:]
        report = json.loads((Path(folder) / "report.json").read_text())
    assert report["completed"] == REQUESTS, report


def check_completions_run_to_their_end(url: str, model: str) -> None:
    _benchmark(url, model, "vllm", "/v1/completions")


def check_chats_run_to_their_end(url: str, model: str) -> None:
    _benchmark(url, model, "openai-chat", "/v1/chat/completions")


def check_responses_run_to_their_end(url: str, model: str) -> None:
    _benchmark(url, model, "openai-responses", "/v1/responses")


def check_embeddings_run_to_their_end(url: str, model: str) -> None:
    _benchmark(url, model, "openai-embeddings", "/v1/embeddings")
