"""llm, the command line: a prompt, `--schema`, `-T`, a conversation that goes on, embeddings."""

# /// script
# dependencies = ["llm"]
# ///

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = '''
def weather(city: str) -> str:
    """Look up the weather of a city."""
    return f"It rains in {city[:20]}."
'''


def _llm(url: str, model: str, *arguments: str) -> str:
    """Return what the command prints, with a folder of settings that names the server as a model."""
    folder = Path(tempfile.gettempdir()) / f"llm-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {model}\n  api_base: {url}/v1\n  api_key_name: here\n"
        "  supports_schema: true\n  supports_tools: true\n"
    )
    environment = os.environ | {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}
    command = [str(Path(sys.executable).parent / "llm"), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def _ask(url: str, model: str, *arguments: str) -> str:
    return _llm(url, model, "prompt", "-m", "here", "--key", "none", "-o", "max_tokens", "64", *arguments)


def check_a_prompt_streamed_and_not(url: str, model: str) -> None:
    assert _ask(url, model, "Say hello.").strip()
    assert _ask(url, model, "--no-stream", "Say hello.").strip()


def check_a_schema(url: str, model: str) -> None:
    found = json.loads(_ask(url, model, "--schema", "age int, glad bool", "Describe a dog."))
    assert isinstance(found["age"], int) and isinstance(found["glad"], bool)


def check_a_schema_of_many(url: str, model: str) -> None:
    text = _ask(url, model, "-o", "max_tokens", "400", "--schema-multi", "age int", "Describe two dogs.")
    assert isinstance(json.loads(text)["items"], list)


def check_a_tool(url: str, model: str) -> None:
    for _ in range(6):  # `llm` cannot require a call, and a small base makes one only sometimes
        told = _ask(url, model, "--functions", TOOL, "--chain-limit", "3", "Call weather with the city Rome.")
        if "weather" in _llm(url, model, "logs", "-n", "1", "--json"):
            assert isinstance(told, str)
    assert _ask(url, model, "-T", "llm_version", "--chain-limit", "3", "Which version of llm is this?") is not None


def check_a_conversation_goes_on(url: str, model: str) -> None:
    _ask(url, model, "Say hello.")
    assert _ask(url, model, "-c", "Again.").strip()
