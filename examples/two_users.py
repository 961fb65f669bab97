"""Two users of one server: each learns the first half of a text, then both sessions score both second halves.

python examples/two_users.py [URL]
"""

import math
import sys
from contextlib import suppress
from pathlib import Path

from imprint import Client, NotFound

TEXTS = Path(__file__).parent
TEXT_BY_USER = {"ada": "keeper", "bo": "loom"}


def main(url: str | None = None) -> None:
    """Print a Markdown table of the perplexities."""
    with Client(url) as client:
        for user, text in TEXT_BY_USER.items():
            with suppress(NotFound):
                client.delete(user)
            client.observe_files(user, [TEXTS / f"{text}-1.txt"])
        print("| perplexity of | frozen base | Ada's memory | Bo's memory |\n| --- | --- | --- | --- |")
        for text in TEXT_BY_USER.values():
            unseen = (TEXTS / f"{text}-2.txt").read_text()
            scores = [client.score(user, unseen) for user in TEXT_BY_USER]
            losses = [score.loss or 0.0 for score in scores]
            frozen = scores[0].frozen_loss or 0.0
            cells = [f"{math.exp(loss):.2f} (× {math.exp(loss - frozen):.3f})" for loss in losses]
            print(f"| {text}-2.txt | {math.exp(frozen):.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:2])
