"""Drafts repeat what followed the last two tokens before."""

from __future__ import annotations

import pytest

from model.decode.prompt_lookup import PromptLookup


@pytest.mark.parametrize(
    ("tokens", "max_drafts", "drafted"),
    [
        ([], 3, []),
        ([1], 3, []),
        ([1, 2, 3], 3, []),
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 0, []),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the last occurrence counts
        ([5, 5, 5], 4, [5, 5, 5, 5]),  # a loop continues
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
    ],
)
def test_what_followed_the_last_two_tokens_is_drafted_again(
    tokens: list[int], max_drafts: int, drafted: list[int]
) -> None:
    at_once, one_by_one = PromptLookup(tokens), PromptLookup(tokens[:2])
    for token in tokens[2:]:
        one_by_one.draft_tokens(2)
        one_by_one.add(token)
    assert at_once.draft_tokens(max_drafts) == one_by_one.draft_tokens(max_drafts) == drafted
