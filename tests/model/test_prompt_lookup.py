"""What a sequence is guessed to say next."""

from __future__ import annotations

import pytest

from model.decode.prompt_lookup import PromptLookup


@pytest.mark.parametrize(
    ("said", "most", "guessed"),
    [
        ([], 3, []),
        ([1], 3, []),
        ([1, 2, 3], 3, []),
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 0, []),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # what came last counts
        ([5, 5, 5], 4, [5, 5, 5, 5]),  # a loop goes on
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
    ],
)
def test_what_followed_the_last_two_tokens_is_guessed_again(
    said: list[int], max_drafts: int, drafted: list[int]
) -> None:
    at_once, one_by_one = PromptLookup(said), PromptLookup(said[:2])
    for token in said[2:]:
        one_by_one.draft_tokens(2)
        one_by_one.add(token)
    assert at_once.draft_tokens(max_drafts) == one_by_one.draft_tokens(max_drafts) == drafted
