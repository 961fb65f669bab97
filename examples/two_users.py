"""Two users, one server: each reads the first half of a text, then both halves that nobody has seen are scored.

python examples/two_users.py [URL]
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import httpx

TEXTS = Path(__file__).parent
READERS = {"ada": "keeper", "bo": "loom"}


def main(url: str) -> None:
    key = os.environ.get("IMPRINT_API_KEY", "none")
    with httpx.Client(base_url=url, timeout=600, headers={"Authorization": f"Bearer {key}"}) as client:

        def ask(method: str, path: str, **body: Any) -> Any:
            reply = client.request(method, f"/v1/sessions/{path}", json=body or None)
            reply.raise_for_status()
            return reply.json()

        for reader, text in READERS.items():
            if client.get(f"/v1/sessions/{reader}").status_code == 200:
                ask("DELETE", reader)
            ask("POST", f"{reader}/observe", text=(TEXTS / f"{text}-1.txt").read_text())
        print("| perplexity of | frozen base | Ada's memory | Bo's memory |\n| --- | --- | --- | --- |")
        for text in READERS.values():
            unseen = (TEXTS / f"{text}-2.txt").read_text()
            scores = [ask("POST", f"{reader}/score", text=unseen) for reader in READERS]
            frozen = scores[0]["frozen_loss"]
            cells = [f"{math.exp(s['loss']):.2f} (× {math.exp(s['loss'] - frozen):.3f})" for s in scores]
            print(f"| {text}-2.txt | {math.exp(frozen):.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
