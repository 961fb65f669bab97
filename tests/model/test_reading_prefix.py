"""The reading prefix: a reply that reads episodes reads it after them, and no other reply does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.base.backbone import Backbone
from model.base.kv_cache import DenseCache
from model.episodes import Episode, Episodes, RecallRequest
from model.memory.episodic.lexicon import shipped_lexicon
from model.memory.episodic.word_tables import build_tables
from model.memory.row_layout import MemoryConfigError
from model.reading_prefix import ReadingPrefix, load_prefix, save_prefix
from tests.model.tiny_lm import tiny_backbone

HEADER, TEXT, NOTE = (7, 8, 9), (1, 2, 3, 4), (11, 12, 13, 14, 15)
EPISODE = Episode(TEXT, 1, 1, 0, 1.0)  # ordinal 1; 0 says that nothing was told


@pytest.fixture(scope="module")
def base() -> Backbone:
    return tiny_backbone()


def rows(base: Backbone, token_ids: tuple[int, ...]) -> DenseCache:
    cache = DenseCache(base.config, 64, device="cpu", dtype=base.embedding.dtype)
    with torch.inference_mode():
        base(torch.tensor([token_ids]), [cache])
    return cache


def prefix_of(base: Backbone, token_ids: tuple[int, ...]) -> ReadingPrefix:
    """Return the prefix whose keys and values are those of tokens after the header."""
    cache, start = rows(base, (*HEADER, *token_ids)), len(HEADER)
    return ReadingPrefix(cache.keys[:, :, start : cache.length], cache.values[:, :, start : cache.length], start)


def episodes(base: Backbone, prefix: ReadingPrefix | None) -> Episodes:
    return Episodes(base, build_tables([]), shipped_lexicon(), str, None, hot_bytes=0, prefix=prefix)


@torch.inference_mode()
@pytest.mark.parametrize("place", [1, 3, 20])
def test_a_prefix_stands_after_the_episodes_like_tokens_there(base: Backbone, place: int) -> None:
    """With the keys and values of a note's tokens, the prefix is the note, up to the rounding of episodes to int8."""
    request = RecallRequest(place, (0, 1), 64, HEADER, prefix=len(NOTE))
    cache, told = rows(base, tuple(range(20, 20 + place))), rows(base, tuple(range(20, 20 + place)))
    episodes(base, prefix_of(base, NOTE)).append(cache, None, [EPISODE], request)
    before = request.cached_tokens([EPISODE]) - len(NOTE)
    episodes(base, None).append(told, None, [EPISODE], RecallRequest(place, (0, 1), 64, HEADER))
    assert told.length == place + before
    episodes(base, None).append(
        told, None, [EPISODE._replace(token_ids=NOTE)], RecallRequest(place, (0, 1), 64, HEADER)
    )
    assert cache.length == place + request.cached_tokens([EPISODE])
    one, other = (x.keys[:, :, : cache.length] for x in (cache, told))
    assert torch.equal(one[:, :, : place + before], other[:, :, : place + before])
    torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)
    torch.testing.assert_close(
        cache.values[:, :, : cache.length], told.values[:, :, : cache.length], atol=0.05, rtol=0.05
    )


def test_without_episodes_there_is_no_prefix() -> None:
    request = RecallRequest(1, (0, 1), 64, HEADER, prefix=len(NOTE))
    assert request.cached_tokens([]) == 0
    assert request.cached_tokens([EPISODE]) == 2 * len(TEXT) + len(NOTE) <= request.max_cached_tokens


@torch.inference_mode()
def test_where_nothing_was_told_other_rows_stand_there(base: Backbone) -> None:
    found, untold = prefix_of(base, NOTE), prefix_of(base, NOTE[::-1])
    prefix = replace(found, untold_keys=untold.keys, untold_values=untold.values)
    request = RecallRequest(3, (0, 1), 64, HEADER, prefix=len(NOTE), untold=TEXT)
    for episode, expected in ((EPISODE, found), (EPISODE._replace(ordinal=0), untold)):
        cache = rows(base, (20, 21, 22))
        episodes(base, prefix).append(cache, None, [episode], request)
        assert torch.equal(cache.values[:, :, cache.length - len(NOTE) : cache.length], expected.values)


def test_a_prefix_comes_back_from_its_file_in_fp16(base: Backbone, tmp_path: Path) -> None:
    prefix = prefix_of(base, NOTE)
    save_prefix(prefix, tmp_path / "a.safetensors")
    found = load_prefix(tmp_path / "a.safetensors", base.config, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(found.keys, prefix.keys.half().float()) and torch.equal(
        found.values, prefix.values.half().float()
    )
    assert (found.start, found.num_tokens) == (len(HEADER), len(NOTE))
    assert found.untold_keys is None
    save_prefix(replace(prefix, untold_keys=prefix.keys + 1, untold_values=prefix.values), tmp_path / "b.safetensors")
    found = load_prefix(tmp_path / "b.safetensors", base.config, device=torch.device("cpu"), dtype=torch.float32)
    assert found.untold_keys is not None and torch.equal(found.untold_keys, (prefix.keys + 1).half().float())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"keys": torch.zeros(1, 2, 3)}, "keys must have the shape"),
        ({"values": torch.zeros(9, 9, 5, 9)}, "values must have the shape"),
        ({"keys": None}, "keys"),
        ({"start": "x"}, "invalid literal"),
        ({"start": "-1"}, "start must be within"),
        ({"start": "100000"}, "start must be within"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    base: Backbone, tmp_path: Path, change: dict[str, object], fault: str
) -> None:
    prefix, path = prefix_of(base, NOTE), tmp_path / "a.safetensors"
    content = {"keys": prefix.keys, "values": prefix.values, "start": str(prefix.start)} | change
    tensors = {name: value.contiguous() for name, value in content.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, path, metadata={"start": str(content["start"])})
    with pytest.raises(MemoryConfigError, match=fault) as error:
        load_prefix(path, base.config, device=torch.device("cpu"), dtype=torch.float32)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x00" * 64])
def test_other_files_are_refused(base: Backbone, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(MemoryConfigError, match="is no reading prefix"):
        load_prefix(tmp_path / "a.safetensors", base.config, device=torch.device("cpu"), dtype=torch.float32)
