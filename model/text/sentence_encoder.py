"""The sentence encoder: a vector of the meaning of a text, by all-MiniLM-L6-v2 (Reimers and Gurevych 2019).

The network is BERT (Devlin et al. 2018, arXiv 1810.04805) with the mean of its last layer's states. A text is encoded
alone, so that its vector does not depend on other texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

MAX_TOKENS = 256  # of a text; what follows is left out, as the model's authors do
FILES = ("config.json", "tokenizer.json", "model.safetensors")


class SentenceEncoder:
    """Encodes texts as vectors of `size` numbers. `id`, from 1 on, tells encoders of other weights apart."""

    def __init__(
        self, config: Mapping[str, int | float], tokenizer: Tokenizer, weights: Mapping[str, Tensor], id: int
    ) -> None:
        self.id = id
        self.size = int(config["hidden_size"])
        self._layers, self._heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        self._epsilon = float(config["layer_norm_eps"])
        self._tokenizer, self._weights = tokenizer, dict(weights)
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.no_padding()

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> SentenceEncoder:
        """Return the encoder of a folder that has `FILES`. Raises OSError, ValueError, KeyError or SafetensorError."""
        config, tokenizer, weights = (folder / name for name in FILES)
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        return cls(
            json.loads(config.read_text("utf-8")),
            Tokenizer.from_file(str(tokenizer)),
            load_file(weights, device=str(device)),
            1 + int.from_bytes(digest[:4]) % (2**31 - 1),
        )

    @torch.inference_mode()
    def __call__(self, text: str) -> NDArray[np.int8]:
        """Return the vector [size] of a text, of length 127 before rounding; zeros for a text without tokens."""
        if not (ids := self._tokenizer.encode(text).ids):
            return np.zeros(self.size, np.int8)
        vector = F.normalize(self._states(ids).mean(0), dim=0)
        return (127 * vector).round().to(torch.int8).cpu().numpy()

    def windows(self, text: str) -> list[list[int]]:
        """Return the token ids of a text of any length, in windows that are encoded alone. Any thread may call this."""
        encoding = self._tokenizer.encode(text)
        return [window.ids for window in (encoding, *encoding.overflowing) if window.ids]

    @torch.inference_mode()
    def sum_of_states(self, window: list[int]) -> NDArray[np.float32]:
        """Return the sum [size] of the last layer's states over the tokens of a window.

        The direction of the sum over all windows of a text is the meaning of the text.
        """
        return self._states(window).sum(0).float().cpu().numpy()

    def _states(self, ids: list[int]) -> Tensor:
        """Return the states [T, d] of the last layer."""
        words = self._weights["embeddings.word_embeddings.weight"]
        states = F.embedding(torch.tensor(ids, device=words.device), words)
        states = states + self._weights["embeddings.position_embeddings.weight"][: len(ids)]
        states = self._norm(
            "embeddings.LayerNorm", states + self._weights["embeddings.token_type_embeddings.weight"][0]
        )
        for layer in range(self._layers):
            states = self._layer(f"encoder.layer.{layer}", states)
        return states

    def _layer(self, name: str, states: Tensor) -> Tensor:
        query, key, value = (
            self._linear(f"{name}.attention.self.{part}", states).unflatten(-1, (self._heads, -1)).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        read = F.scaled_dot_product_attention(query[None], key[None], value[None])[0].transpose(0, 1).flatten(1)
        read = self._linear(f"{name}.attention.output.dense", read)
        states = self._norm(f"{name}.attention.output.LayerNorm", states + read)
        inner = F.gelu(self._linear(f"{name}.intermediate.dense", states))
        return self._norm(f"{name}.output.LayerNorm", states + self._linear(f"{name}.output.dense", inner))

    def _linear(self, name: str, states: Tensor) -> Tensor:
        return F.linear(states, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, name: str, states: Tensor) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(states, weight.shape, weight, bias, self._epsilon)
