"""`imprint fit`: a usable memory for any base, in minutes.

The base reads a text once. Three quarters of the streams fit the memory: the keys in closed form
(`model.memory.initial.fitted_memory`), the gate by a few hundred steps (`gate_calibration`). The other streams tell
what the memory is worth, read and learned as by a server.
"""

from __future__ import annotations

import math
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.base.backbone import Backbone
from model.base.checkpoint import CheckpointError, fingerprint, load_backbone
from model.base.config import ConfigError
from model.memory import Memory, Pool, choose_backend, save_memory
from model.memory.initial import default_config, fitted_memory, random_memory
from model.memory.lexical import ops
from model.text.tokenizer import Tokenizer
from research.corpus import base_folder, console, progress_bar, read_text, text_files
from research.training.features import (
    BOS_PLACEHOLDER,
    FeaturesError,
    StreamFeatures,
    compute_features,
    cut_lengths,
)
from research.training.gate_calibration import StreamVocabulary, calibrate_gate
from research.training.prepare import format_duration
from research.training.processes import feature_dtype, training_device
from service.errors import CommandError
from service.model_loading import fitted_memory_path, shipped_memory, shipped_name
from service.settings import Settings

SHORTEST, LONGEST = 128, 1024  # tokens of a request, if the base's context is not shorter
GATE_STEPS = 500
HELD_OUT = 4  # one stream in so many is held out
STREAM_TOKENS = 3072  # of one file, at most
CHARS_PER_TOKEN = 8  # an upper bound, to cut long files before they are tokenised
TOPIC_CHARS, TOPIC_STREAMS = 14_000, 5
MODULES = ("argparse", "difflib", "email/message", "heapq", "shutil", "statistics", "textwrap")


@dataclass(frozen=True)
class FitOptions:
    """The options of `imprint fit`.

    text: file or folder to fit to; None = the text that Python brings along
    out: checkpoint to write; None = where the server looks for the memory of the base
    tokens: tokens to read, at most
    """

    text: Path | None
    out: Path | None
    tokens: int


@dataclass(frozen=True)
class _Stream:
    """The token ids of a stream and the lengths of its requests."""

    ids: list[int]
    lengths: list[int]


def fit_base(settings: Settings, options: FitOptions) -> None:
    """Fit a memory to the settings' base, and write it unless an unfitted one is as good. Raises CommandError."""
    started = time.process_time()
    if shipped_name(settings.model) and options.out is None:
        raise CommandError(f"a trained memory is shipped for {settings.model}: name a file in --out to fit another")
    device, folder = training_device(settings), base_folder(settings)
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    try:
        tokenizer, base = Tokenizer.load(folder), fingerprint(folder)
        backbone = load_backbone(folder, device=device, dtype=feature_dtype(device))
        longest = min(LONGEST, backbone.config.max_context)
        streams = _cut_streams(_texts(options.text), tokenizer, options.tokens, longest)
        out = options.out or fitted_memory_path(settings.cache_dir, base)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fit-") as scratch:
            features = _read(backbone, streams, tokenizer.start_token_id, Path(scratch))
            held_out = features[HELD_OUT - 1 :: HELD_OUT]
            memory = _fit(backbone, [stream for stream in features if stream not in held_out])
            _compare(backbone, memory, held_out)
            _replace(memory, out)
    except (CheckpointError, ConfigError, FeaturesError, ValueError, OSError) as error:
        raise CommandError(f"{settings.model}: {error}") from error
    console.print(f"Written: {out} ({format_duration(time.process_time() - started)} of CPU time)")
    if options.out is None:
        console.print(f"A server with IMPRINT_MODEL={settings.model} finds this memory by itself.")
    else:
        console.print(f"To serve it: IMPRINT_MODEL={settings.model} IMPRINT_MEMORY={out} imprint serve")
    console.print("Sessions belong to the memory that wrote them: those of another memory are refused.")


def _texts(source: Path | None) -> list[str]:
    """Return the texts under a path, or the reference and modules of Python that every installation has.

    Raises CommandError if no text is there.
    """
    if source is not None:
        texts = [read_text(file) for file, _ in text_files([source])]
        if not texts:
            raise CommandError(f"--text: no .txt, .md or .rst file in {source}")
        return texts
    try:
        from pydoc_data.topics import topics

        library = Path(sysconfig.get_path("stdlib"))
        modules = [(library / f"{name}.py").read_text("utf-8") for name in MODULES]
    except (ImportError, OSError) as error:
        raise CommandError(f"this Python has no texts of its own ({error}): name texts in --text") from error
    reference = "\n\n".join(topics[name] for name in sorted(topics))
    parts = [reference[n * TOPIC_CHARS : (n + 1) * TOPIC_CHARS] for n in range(TOPIC_STREAMS)]
    # Alternating, so that some of both kinds are held out.
    return [text for pair in zip(modules, parts, strict=False) for text in pair] + modules[len(parts) :]


def _cut_streams(texts: Sequence[str], tokenizer: Tokenizer, tokens: int, longest: int) -> list[_Stream]:
    """Return the beginnings of the texts as streams of requests. Raises CommandError for too little text."""
    streams, total, shortest = list[_Stream](), 0, min(SHORTEST, longest)
    if len(texts) < HELD_OUT:  # a few long texts: their parts are streams
        size = max(1, max(map(len, texts)) // HELD_OUT)
        texts = [text[at : at + size] for text in texts for at in range(0, len(text), size)]
    limit = min(STREAM_TOKENS, max(tokens // len(texts), shortest))
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text[: limit * CHARS_PER_TOKEN])[int(tokenizer.add_bos) :][:limit]
        lengths = cut_lengths(len(ids), shortest, longest, str(number))
        if lengths and total < tokens:
            streams.append(_Stream(ids, lengths))
            total += sum(lengths)
    if len(streams) < HELD_OUT:
        raise CommandError(f"the text must have at least {HELD_OUT} parts of {shortest} tokens, got {len(streams)}")
    return streams


def _read(backbone: Backbone, streams: Sequence[_Stream], bos: int, scratch: Path) -> list[StreamFeatures]:
    """Return the features of the streams, which the base reads."""
    features = []
    with progress_bar() as bar:
        task = bar.add_task("reading with the base", total=sum(sum(stream.lengths) for stream in streams))
        for number, stream in enumerate(streams):
            folder = scratch / str(number)
            compute_features(backbone, stream.ids, stream.lengths, bos, folder, progress=lambda n: bar.advance(task, n))
            features.append(StreamFeatures(folder))
    return features


def _fit(backbone: Backbone, streams: Sequence[StreamFeatures]) -> Memory:
    """Return a memory that is fitted to streams."""
    chunks = [stream.chunk(0, stream.requests) for stream in streams]
    states, targets = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("states", "targets"))
    console.print(f"Fitting the keys to {len(targets):,} tokens")
    config = default_config(backbone.config.hidden_size)
    memory = fitted_memory(config, states, targets, shipped_memory(), seed=0)
    with progress_bar() as bar:
        task = bar.add_task("fitting the gate", total=2 * len(streams))
        calibrate_gate(
            memory,
            streams,
            backbone.head_matrix.cpu(),
            seed=0,
            steps=GATE_STEPS,
            progress=lambda n: bar.advance(task, n),
        )
    return memory


def _compare(backbone: Backbone, fitted: Memory, held_out: Sequence[StreamFeatures]) -> None:
    """Print what a fitted memory is worth. Raises CommandError if an unfitted one is as good."""
    head, count = backbone.head_matrix.cpu(), sum(stream.tokens for stream in held_out)
    frozen = -sum(float(stream.chunk(0, stream.requests).log_probs.sum()) for stream in held_out) / count
    ratios = []
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=2 * count)
        for memory in (random_memory(fitted.config, seed=0), fitted):
            loss = sum(
                served_loss(memory, stream, head, progress=lambda n: bar.advance(task, n)) for stream in held_out
            )
            ratios.append(math.exp(loss / count - frozen))
    console.print(f"On {count:,} tokens of the text that were kept apart, learned as a server would learn them:")
    console.print(f"  the base alone             perplexity {math.exp(frozen):.2f}")
    console.print(f"  with an unfitted memory    × {ratios[0]:.3f}")
    console.print(f"  with the fitted memory     × {ratios[1]:.3f}")
    if ratios[1] >= ratios[0]:
        raise CommandError("the fitted memory is no better than an unfitted one: nothing is written; try more text")


@torch.no_grad()
def served_loss(
    memory: Memory, stream: StreamFeatures, head: Tensor, *, progress: Callable[[int], None] = lambda _: None
) -> float:
    """Return the summed loss in nats of a stream that a new session predicts and learns, request by request.

    head: [V, d] of the base. Trust and guards work as in a server. Raises ValueError without a lexical site.
    """
    site = memory.lexical
    if site is None:
        raise ValueError("a memory with a lexical site is needed")
    device = torch.device("cpu")
    pool = Pool(memory.config, rows=3 * site.config.slots, sessions=2, device=device, backend=choose_backend(device))
    session, vocabulary, loss = pool.open(), StreamVocabulary([stream], head), 0.0
    for number in range(stream.requests):
        chunk, draft, trust = stream.chunk(number, 1), pool.draft(session), site.initial_trust()
        hashes = ops.hash_request_ngrams(chunk.targets, BOS_PLACEHOLDER)
        parts = (chunk.states, vocabulary.numbers(chunk.targets), chunk.log_probs, chunk.entropy, hashes)
        for states, targets, frozen, entropy, context in zip(
            *(part.split(memory.config.block) for part in parts), strict=True
        ):
            prediction = vocabulary.predict(states, targets, frozen, entropy)
            sessions = torch.full((len(targets),), draft.index)
            readout = site.read(pool, sessions, states, context, prediction, trust.expand(len(targets), -1))
            memory_probs = ops.memory_prob(targets, readout.tokens, readout.shares)
            loss -= float(ops.target_log_prob(frozen, memory_probs, readout.gamma).sum())
            trust = site.updated_trust(trust, readout, targets, frozen)
            site.learn(draft, readout, targets, frozen)
        draft.commit()
        progress(len(chunk.targets))
    return loss


def _replace(memory: Memory, out: Path) -> None:
    """Write a memory so that a reader finds all of it or nothing."""
    part = out.with_name(f".{out.name}.part")
    save_memory(memory, part)
    os.replace(part, out)
