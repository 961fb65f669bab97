"""A model folder is loaded completely, or refused with the file and the fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.base.checkpoint import CheckpointError, fingerprint, load_backbone
from model.base.config import ConfigError, LinearScaling, tiny_config
from model.base.families import parse_config
from tests.model.random_models import byte_level_bpe, random_llama
from tests.tiny import llama_fields

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder with its weights in several shards."""
    folder = tmp_path_factory.mktemp("saved")
    random_llama().save_pretrained(folder, max_shard_size="40KB")
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        shards = sorted(folder.glob("model-*.safetensors"))
        weights = {name: weight for shard in shards for name, weight in load_file(shard).items()}
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def edit_json(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))

    return damage


def truncate(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: must hold a JSON object"),
        (edit_json("config.json", hidden_act="gelu"), "config.json: hidden_act must be silu or .*, got gelu"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
        (edit_json("model.safetensors.index.json", weight_map=3), "weight_map must map"),
        (lambda folder: first_shard(folder).unlink(), "named in model.safetensors.index.json but not there"),
        (truncate, r"safetensors: damaged or not safetensors"),
        (lambda folder: first_shard(folder).write_bytes(b""), r"safetensors: damaged or not safetensors"),
        (edit_weights(lambda weights: weights.pop("model.norm.weight")), "missing tensor model.norm.weight"),
        (edit_weights(lambda w: w.update({"x.bias": torch.zeros(1)})), "unexpected tensor x.bias"),
        (
            edit_weights(lambda weights: weights.update({"model.norm.weight": torch.zeros(61)})),
            r"tensor model.norm.weight must have shape \[60\], got \[61\]",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(folder)


def test_tensors_that_follow_from_others_are_tolerated(tmp_path: Path) -> None:
    original = random_llama(tie_word_embeddings=True)
    original.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(7)
    save_file(weights, tmp_path / "model.safetensors")
    assert load_backbone(tmp_path).config.tie_embeddings


def test_equal_folders_have_equal_fingerprints(saved: Path, folder: Path) -> None:
    assert fingerprint(folder) == fingerprint(saved)
    assert fingerprint(folder).startswith("sha256:")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "weights"])
def test_a_change_of_any_file_that_matters_changes_the_fingerprint(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    path = first_shard(folder) if name == "weights" else folder / name
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b" ")
    assert fingerprint(folder) != before


def test_a_folder_without_a_tokenizer_has_no_fingerprint(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        fingerprint(folder)


def test_older_and_newer_spellings_of_rope_mean_the_same() -> None:
    base = {k: v for k, v in llama_fields(tiny_config()).items() if not k.startswith("rope")}
    old = base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    new = base | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert parse_config(old) == parse_config(new)
    rotary = parse_config(old).layers[0].rotary
    assert rotary is not None and (rotary.theta, rotary.scaling) == (5e5, LinearScaling(2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures must be LlamaForCausalLM or .*, got MambaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "architectures must be LlamaForCausalLM or .*, got gpt2"),
        ({"hidden_act": "relu"}, "hidden_act must be silu or gelu_pytorch_tanh, got relu"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type must be default or .* or longrope, got dynamic"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor must be a positive number, got None"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor must be a list of numbers, got None"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number, got None"),
        ({"quantization_config": {}}, "quantization_config must be absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"hidden_size": None}, "hidden_size must be an integer, got None"),
        ({"vocab_size": "many"}, "vocab_size must be an integer, got 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be from 1 to 1024, got 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be from 1 to 1024, got 1000000000"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": 15}, "head_dim must be even for rotary embeddings, got 15"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(llama_fields(tiny_config()) | changes)
