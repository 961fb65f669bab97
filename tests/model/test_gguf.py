"""A converted GGUF file equals the model that was written to the file; a bad file leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import model.base.gguf
from model.base.checkpoint import load_backbone
from model.base.config import LinearScaling, Llama3Scaling, RopeScaling, Rotary
from model.base.gguf import convert, read_config
from model.base.gguf_metadata import GGUFError
from model.base.rotary import rotation_tables
from model.text.tokenizer import Tokenizer
from tests.model.random_models import (
    LONGROPE,
    TEXT,
    VOCAB_SIZE,
    byte_level_bpe,
    quantized,
    random_family_model,
    random_llama,
    tokens,
    write_gguf,
)
from tests.tiny import CHAT_TEMPLATE

CHAT = [{"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "On the mat."}]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Return the path of a GGUF file, and of its conversion in an empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "tiny.gguf", tmp_path / "out" / "base"


@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_is_the_original(files: tuple[Path, Path], tied: bool) -> None:
    source, folder = files
    original = random_llama(tie_word_embeddings=tied)
    write_gguf(source, original)
    convert(source, folder)
    backbone, reread = load_backbone(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens(2, 40)
    torch.testing.assert_close(backbone.logits(backbone(ids)), original(ids).logits, atol=1e-4, rtol=0)
    assert torch.equal(reread(ids).logits, original(ids).logits)
    assert backbone.config.tie_embeddings is tied
    assert backbone.config.rms_norm_eps == original.config.rms_norm_eps


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16])
def test_quantised_weights_become_their_exact_values(files: tuple[Path, Path], kind: GGMLQuantizationType) -> None:
    source, folder = files
    original = random_llama(hidden_size=64, head_dim=16, num_attention_heads=4, intermediate_size=96)
    write_gguf(source, original, kind=kind)
    convert(source, folder)
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == original.state_dict().keys()
    for name, weight in original.state_dict().items():
        array = weight.numpy()
        # Quantisation works along rows, and so commutes with the permutation of rows.
        expected = dequantize(quantize(array, kind), kind) if array.ndim == 2 else array
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], expected)


def test_the_converted_tokenizer_splits_digits_and_knows_its_special_tokens(files: tuple[Path, Path]) -> None:
    source, folder = files
    write_gguf(source, random_llama())
    convert(source, folder)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    plain = byte_level_bpe()  # without the rule for digits, which makes no difference in text without digits
    words = TEXT.replace("12", "").replace("345", "")
    assert ours.encode(words) == plain.encode(words).ids == theirs(words).input_ids
    assert [ours.token_bytes(i) for i in ours.encode("345 <|im_end|>")] == [b"3", b"4", b"5", b" ", b"<|im_end|>"]
    assert ours.encode_chat(CHAT).token_ids.tolist() == theirs.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert theirs.chat_template == CHAT_TEMPLATE
    assert (ours.vocab_size, ours.bos_token_id, set(ours.eos_token_ids)) == (VOCAB_SIZE, 1, {2})


@pytest.mark.parametrize("add_bos", [True, False])
def test_text_starts_with_bos_if_the_file_says_so(files: tuple[Path, Path], add_bos: bool) -> None:
    source, folder = files
    write_gguf(source, random_llama(), metadata={"tokenizer.ggml.add_bos_token": add_bos})
    convert(source, folder)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("cat") == theirs("cat").input_ids
    assert (ours.encode("cat")[0] == 1) is ours.add_bos is add_bos


def test_linear_rope_scaling_is_kept(files: tuple[Path, Path]) -> None:
    source, folder = files
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(source, random_llama(), metadata=scaling)
    convert(source, folder)
    rotary = load_backbone(folder).config.layers[0].rotary
    assert rotary is not None and rotary.scaling == LinearScaling(4.0)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LLAMA3["original_max_position_embeddings"] = 32
PHI3_FACTORS = {
    f"rope_factors_{kind}.weight": np.array(LONGROPE[f"{kind}_factor"], np.float32) for kind in ("short", "long")
}


def llama3_factors() -> Tensor:
    """Return the factor of each frequency, as llama.cpp's converter writes them."""
    plain, scaled = (rotation_frequencies(scaling) for scaling in (None, Llama3Scaling(8.0, 1.0, 4.0, 32)))
    return plain / scaled


def rotation_frequencies(scaling: RopeScaling | None) -> Tensor:
    """Return the frequencies `[8]` of a head of 16, from the angles at position 1."""
    cos, sin = rotation_tables(Rotary(1e4, 16, scaling), 16, 2)
    return torch.atan2(sin[1, 8:], cos[1, 8:]).double()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("case", "changes", "tensors"),
    [
        ("llama", {}, {}),
        ("llama", {"rope_parameters": LLAMA3}, {"rope_freqs.weight": llama3_factors().float().numpy()}),
        ("qwen2", {}, {}),
        ("qwen3", {}, {}),
        ("mistral", {}, {}),
        ("gemma3", {"query_pre_attn_scalar": 24}, {}),
        ("phi3", {}, {}),
        ("phi3-part", {}, PHI3_FACTORS),
        ("olmo2", {}, {}),
        ("granite", {}, {}),
        ("smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 5}, {}),
    ],
)
def test_every_familys_file_becomes_its_model(
    files: tuple[Path, Path], case: str, changes: dict[str, Any], tensors: dict[str, Any]
) -> None:
    """Names, order of rows, norms and numbers are those that llama.cpp's converter writes."""
    source, folder = files
    original = random_family_model(case, **changes)
    write_gguf(source, original, tensors=tensors)
    convert(source, folder)
    backbone, ids = load_backbone(folder), tokens(2, 40)
    torch.testing.assert_close(backbone.logits(backbone(ids)), original(ids).logits, atol=2e-4, rtol=0)
    assert read_config(source) == backbone.config
    reread = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(reread(ids).logits, original(ids).logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"])
def test_k_quants_and_iq_become_the_values_that_the_gguf_package_reads(files: tuple[Path, Path], kind: str) -> None:
    source, folder = files
    original = random_family_model("qwen2", hidden_size=256, intermediate_size=256)
    stored = GGMLQuantizationType[kind]
    write_gguf(source, original, kind=stored)
    convert(source, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in original.named_parameters():
        if weight.ndim == 2:
            np.testing.assert_array_equal(weights[name], dequantize(quantized(weight.numpy(), stored), stored))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre must be smollm or .*, got tekken"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model must be gpt2 .* or llama .*, got t5"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.scores is missing"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
            "llama.rope.scaling.type must be none, linear or yarn, got longrope",
        ),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.factor is missing"),
        ({"llama.rope.dimension_count": 7}, r"partial_rotary_factor must be 1, got 0\.5"),
        ({"llama.attention.value_length": 7}, "llama.attention.value_length must be the size of keys 14, got 7"),
        ({"llama.attention.sliding_window": 9}, "llama.attention.sliding_window must be absent, got 9"),
        ({"llama.attention.head_count_kv": 4}, "num_heads must be a multiple of num_kv_heads, got 6 and 4"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"general.architecture": "mamba"}, "general.architecture must be llama or .*, got mamba"),
    ],
)
def test_an_unsupported_file_is_refused_by_name(
    files: tuple[Path, Path], metadata: dict[str, Any], message: str
) -> None:
    source, folder = files
    write_gguf(source, random_llama(), metadata=metadata)
    with pytest.raises(GGUFError, match=message):
        convert(source, folder)
    assert not list(folder.parent.iterdir())


def test_a_tensor_without_a_place_is_refused_by_name(files: tuple[Path, Path]) -> None:
    source, folder = files
    write_gguf(source, random_llama(), tensors={"blk.0.ffn_gate_exps.weight": np.zeros((2, 4), np.float32)})
    with pytest.raises(GGUFError, match=r"tensor blk\.0\.ffn_gate_exps\.weight has no place .* architecture llama"):
        convert(source, folder)
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.02, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(files: tuple[Path, Path], kept: float) -> None:
    source, folder = files
    write_gguf(source, random_llama())
    content = source.read_bytes()
    source.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(GGUFError, match=r"tiny\.gguf: damaged or not GGUF"):
        convert(source, folder)
    assert not list(folder.parent.iterdir())


def test_files_that_are_not_gguf_or_not_there_are_refused(files: tuple[Path, Path]) -> None:
    source, folder = files
    with pytest.raises(GGUFError, match="No such file"):
        convert(source, folder)
    source.write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(GGUFError, match="GGUF magic invalid"):
        convert(source, folder)


def test_an_interrupted_conversion_leaves_nothing_half_done(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = files
    write_gguf(source, random_llama())

    def interrupt(weights: dict[str, Any], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.base.gguf, "save_file", interrupt)
        convert(source, folder)
    assert not list(folder.parent.iterdir())
    convert(source, folder)
    assert load_backbone(folder)
