"""The worker process of the `transformers` arm: reads requests as lines of JSON, and writes the time of each token.

The program imports nothing of this project. `python transformers_worker.py MODEL THREADS`; a request is
{"prompt": token ids, "tokens": number}, its answer {"times": seconds from the request's arrival to each token}.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


class TokenTimer:
    """A stopping criterion that never stops and records the time of each token."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter() - self.started)
        return input_ids.new_zeros(len(input_ids), dtype=bool)


def main(model: str, threads: int) -> None:
    """Answer requests from standard input until its end."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteriaList

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)  # nosec B615
    lm = lm.to(device)
    lm.generation_config.eos_token_id = None  # generation continues past the end of a text
    answers, sys.stdout = sys.stdout, sys.stderr  # only answers go to standard output
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request, timer = json.loads(line), TokenTimer()
        ids = torch.tensor([request["prompt"]], device=device)
        lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["tokens"],
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([timer]),
        )
        print(json.dumps({"times": timer.times}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
