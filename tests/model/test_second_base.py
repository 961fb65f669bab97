"""The second real base, where its GGUF file is: the logits and the tokens that `transformers` has, and answers.

`SECOND_BASE` names the file, Qwen2.5-Coder-0.5B-Instruct in Q4_K_M. Its conversion takes some minutes and 2.5 GB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest
import torch
from gguf import MODEL_ARCH, GGUFReader, TokenType, get_tensor_name_map
from gguf.quants import dequantize
from transformers import Qwen2Config, Qwen2ForCausalLM

from model.base.checkpoint import load_backbone
from model.base.gguf_tokenizer import build_tokenizer
from model.decode.backend import choose_decode_step
from model.text.tokenizer import Tokenizer
from service.base_cache import resolve_base
from tests.conftest import Server
from tests.live import Client
from tests.model.test_backbone import PROSE
from tests.model.test_gguf_tokenizer import qwen2_tokenizer, sample

pytestmark = pytest.mark.second
CODE = "def fibonacci(n):\n    if n < 2:\n        return n\n    return"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    file = Path(os.environ.get("SECOND_BASE", ""))
    if not file.is_file():
        pytest.skip("SECOND_BASE names no GGUF file")
    return file


@pytest.fixture(scope="module")
def cache_dir() -> Path:
    return Path(os.environ.get("IMPRINT_CACHE_DIR") or platformdirs.user_cache_path("imprint"))


@pytest.fixture(scope="module")
def folder(gguf_file: Path, cache_dir: Path) -> Path:
    return resolve_base(str(gguf_file), cache_dir, progress=print)


@pytest.fixture(scope="module")
def server(gguf_file: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(str(gguf_file), tmp_path_factory.mktemp("second") / "data", cache_dir=folder.parent).start()
    yield running
    assert running.stop() == 0, running.log.read_text()


def test_it_has_the_ids_of_transformers(gguf_file: Path) -> None:
    content = {name: field.contents() for name, field in GGUFReader(gguf_file).fields.items()}
    tokens, kinds = content["tokenizer.ggml.tokens"], content["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in content["tokenizer.ggml.merges"]]
    theirs, ours = qwen2_tokenizer({token: i for i, token in enumerate(tokens)}, merges, {}), build_tokenizer(content)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    theirs.add_special_tokens({"additional_special_tokens": special})
    for text in sample():
        assert ours.encode(text).ids == theirs(text).input_ids, text


@torch.inference_mode()
def test_it_computes_what_transformers_computes_from_the_same_file(gguf_file: Path, folder: Path) -> None:
    """The model of `transformers` has the published sizes, and takes its weights by the names of the `gguf` package."""
    config = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    original = Qwen2ForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf_file).tensors}
    for name, weight in original.named_parameters():
        stem, kind = name.rsplit(".", 1)
        tensor = tensors[f"{names.get_name(stem)}.{kind}"]
        weight.copy_(torch.tensor(dequantize(tensor.data, tensor.tensor_type)))
    base, tokenizer = load_backbone(folder), Tokenizer.load(folder)
    ids = torch.tensor([tokenizer.encode(PROSE + CODE)])
    expected, found = original(ids).logits[0], base.logits(base(ids))[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # the rounding of fp32 in 24 layers
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    decoder, cache = base.fp16_decoder(choose_decode_step(base)), base.new_cache(ids.shape[1])
    base(ids[:, :-1], [cache])
    step = decoder.logits(decoder(ids[:, -1:], [cache]))[0, 0]
    assert torch.equal(step.argmax(), expected[-1].argmax())


def test_it_answers_and_learns(server: Server) -> None:
    with Client(server.url, model=str(server.model)) as client:
        text = client.complete(CODE, max_tokens=12)["choices"][0]["text"]
        assert "fibonacci(n-1)" in text.replace(" ", "")
        reply = client.chat([{"role": "user", "content": "What is the capital of France? One word."}])
        assert "Paris" in reply["choices"][0]["message"]["content"]
        client.observe("notes", "The deployment script of project Heron is called lift_off.sh.")
        asked = "What is the deployment script of project Heron called?"
        reply = client.chat([{"role": "user", "content": asked}], session="notes", max_completion_tokens=24)
        assert "lift_off" in reply["choices"][0]["message"]["content"]
