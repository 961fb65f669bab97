"""`imprint fit`: an initial memory for a base that none is shipped for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.memory import save_memory
from model.training.initial import Passage, default_config, fitted_memory, read_passage
from service.lab.corpus import console, load_model, progress_bar, read_streams
from service.settings import Settings


def fit_files(
    settings: Settings, paths: Sequence[Path], *, out: Path, requests: int, window: int, streams: int, seed: int
) -> None:
    """Writes the checkpoint of `imprint fit` to `out`."""
    lm, tokenizer = load_model(settings)
    found = read_streams(paths, tokenizer, requests, window, streams, seed=seed)
    passages: list[list[Passage]] = []
    with progress_bar() as bar:
        task = bar.add_task("reading with the base", total=sum(len(stream.requests) for stream in found))
        for stream in found:
            passages.append([])
            for request in stream.requests:
                passages[-1].append(read_passage(lm.backbone, request, tokenizer.start_token_id))
                bar.advance(task)
        replay = bar.add_task("fitting the read gate", total=len(passages))
        memory = fitted_memory(
            default_config(lm.backbone.config.hidden_size),
            passages,
            seed=seed,
            progress=lambda done: bar.update(replay, completed=done),
        )
    save_memory(memory, out)
    console.print(f"{out}: {memory.fingerprint()}")
