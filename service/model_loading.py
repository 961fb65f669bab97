"""Loading what the server serves: the base, the memory and the policies, and the engine on them."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, get_args

import psutil
import torch

from model.adaptive_lm import AdaptiveLM
from model.base.backbone import Backbone
from model.base.checkpoint import fingerprint, load_backbone
from model.base.config import ModelConfig
from model.decode.backend import choose_decode_step
from model.decode.cuda_graphs import wrap_for_serving
from model.episodes import MEANING_NUMBERS, Episodes
from model.memory import Memory, load_memory
from model.memory.episodic.lexicon import shipped_lexicon
from model.memory.episodic.word_tables import build_tables
from model.memory.initial import default_config, random_memory
from model.policies.network import Policy, load_policy
from model.reading_prefix import ReadingPrefix, load_prefix
from model.recall import RecallPlan
from model.tabular.config import Task
from model.tabular.config import default_config as tabular_config
from model.tabular.loading import new_learner
from model.text.grammar import GrammarCompiler
from model.text.sentence_encoder import SentenceEncoder
from model.text.tokenizer import Tokenizer
from service.base_cache import BaseError, resolve_base, resolve_encoder
from service.engine import AnyLearner, Engine
from service.http.schemas import MAX_CHOICES
from service.metrics import Metrics
from service.settings import Settings
from service.turns.loaded_model import LoadedModel

LOADER_THREAD = "imprint-load"  # name of the thread that loads the model
KV_SHARE = 0.4  # share of the memory free at the start that the key-value cache gets
PREFIX_SUFFIX = ".reading.safetensors"
DEFAULT_BASE, DEFAULT_HIDDEN_SIZE = "smollm2-135m-instruct", 576
SHIPPED_MEMORIES = (DEFAULT_BASE, "qwen2.5-coder-0.5b-instruct")  # each a file in model/checkpoints

log = logging.getLogger(__name__)


class StartError(Exception):
    """An error that keeps the server from starting; the message is one line."""


async def load_in_thread(settings: Settings, metrics: Metrics) -> LoadedModel:
    """Load the model in a thread of its own, so that the server answers probes meanwhile.

    Nothing waits for the thread when the server is told to stop.
    """
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[LoadedModel] = loop.create_future()

    def settle(outcome: LoadedModel | Exception) -> None:
        if loaded.done():
            return
        if isinstance(outcome, Exception):
            loaded.set_exception(outcome)
        else:
            loaded.set_result(outcome)

    def load() -> None:
        outcome: LoadedModel | Exception
        try:
            outcome = load_model(settings, metrics)
        except Exception as error:
            outcome = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=load, name=LOADER_THREAD, daemon=True).start()
    return await loaded


def load_model(settings: Settings, metrics: Metrics) -> LoadedModel:
    """Load the base, the memory and the policies, and build the engine on them."""
    started = time.monotonic()
    folder = resolve_base(settings.model, settings.cache_dir, progress=log.info)
    device = _choose_device(settings)
    backbone = load_backbone(folder, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    tokenizer = Tokenizer.load(folder, special_in_messages=settings.message_special_tokens == "tokens")
    base = fingerprint(folder)
    memory = choose_memory(settings, backbone.config.hidden_size, base).to(device)
    learners = {learner.config.name: learner for learner in choose_learners(settings)}
    policy_fingerprints = {name: learner.fingerprint() for name, learner in learners.items()}
    policies, former_names = dict[str, Policy](), dict[str, str]()
    for policy in choose_policies(settings):
        name = served_name(policy, learners)
        if name != policy.config.name:
            former_names[policy.config.name] = name
        policy_fingerprints[name] = policy.fingerprint()
        policy.config = replace(policy.config, name=name)
        policies[name] = policy.to(device)
    context = min(settings.context or backbone.config.max_context, backbone.config.max_context)
    episodes = new_episodes(settings, backbone, tokenizer, progress=log.info)
    lm = AdaptiveLM(backbone, memory, decoder=choose_decoder(settings, backbone), episodes=episodes)
    engine = _new_engine(settings, lm, tokenizer, policies, learners, metrics, context)
    fingerprints = {"base": base, "memory": memory.fingerprint()}
    metrics.build_info.info({"version": version("imprint"), "model": settings.model, **fingerprints})
    _watch_device(metrics, device)
    log.info("loaded %s on %s in %.1f s", settings.model, device, time.monotonic() - started)
    # A garbage collection visits every object while it holds the interpreter's lock: 0.4 s for the objects of torch and
    # the model, 0.1 s for the tokens of a long text. So the former are left out, and collections are rarer.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    return LoadedModel(
        engine,
        tokenizer,
        fingerprints,
        context,
        backbone.config.vocab_size,
        backbone.num_parameters,
        RecallPlan.of(tokenizer, settings.recall_tokens, episodes.prefix),
        GrammarCompiler(tokenizer, backbone.config.vocab_size),
        policies,
        learners,
        former_names,
        policy_fingerprints,
        episodes.encoder,
        _num_parameters(backbone),
        sum(file.stat().st_size for file in folder.iterdir()),
    )


def _num_parameters(backbone: Backbone) -> int:
    """Return the number of weights of a base; a head that is the embedding counts once, also where a copy is packed."""
    tied = "head." if backbone.config.tie_embeddings else "-"
    return sum(weight.numel() for name, weight in backbone.named_parameters() if not name.startswith(tied))


def new_episodes(
    settings: Settings, backbone: Backbone, tokenizer: Tokenizer, *, progress: Callable[[str], None]
) -> Episodes:
    """Return the episodic memory on a base. Raises BaseError for an encoder that cannot be found."""
    lexicon, hot_bytes = shipped_lexicon(), settings.recall_hot_bytes
    tables = build_tables([tokenizer.text_bytes(token) for token in range(backbone.config.vocab_size)])
    if not settings.recall_tokens:  # nothing reads the encoder and the prefix, and they take a while to load
        return Episodes(backbone, tables, lexicon, tokenizer.decode, None, hot_bytes=hot_bytes)
    encoder = load_encoder(settings, backbone.embedding.device, progress=progress)
    device, dtype = backbone.embedding.device, backbone.embedding.dtype
    prefix = load_reading_prefix(settings, backbone.config, device=device, dtype=dtype)
    return Episodes(backbone, tables, lexicon, tokenizer.decode, encoder, hot_bytes=hot_bytes, prefix=prefix)


def load_encoder(
    settings: Settings, device: torch.device, *, progress: Callable[[str], None]
) -> SentenceEncoder | None:
    """Return the sentence encoder of the settings. Raises BaseError."""
    folder = resolve_encoder(settings.recall_encoder, settings.cache_dir, progress=progress)
    if folder is None:
        return None
    try:
        encoder = SentenceEncoder.load(folder, device)
        encoder("A text that needs every weight.")
    except Exception as error:  # foreign files can make the libraries fail in many ways
        raise BaseError(f"sentence encoder {folder}: {type(error).__name__}: {error}") from error
    if encoder.size != MEANING_NUMBERS:
        raise BaseError(f"sentence encoder {folder}: hidden_size must be {MEANING_NUMBERS}, got {encoder.size}")
    return encoder


def _new_engine(
    settings: Settings,
    lm: AdaptiveLM,
    tokenizer: Tokenizer,
    policies: dict[str, Policy],
    learners: dict[str, AnyLearner],
    metrics: Metrics,
    context: int,
) -> Engine:
    kv_tokens = settings.kv_tokens or _kv_tokens(lm.backbone, context)
    return Engine(
        # A request larger than the budget runs alone: the caches must have room for the largest request.
        wrap_for_serving(
            lm, kv_tokens=max(kv_tokens, MAX_CHOICES * context), max_batch=max(settings.max_batch, MAX_CHOICES)
        ),
        tokenizer,
        max_turns=settings.max_queue,
        max_batch=settings.max_batch,
        kv_tokens=kv_tokens,
        hot_rows=settings.hot_rows,
        hot_sessions=settings.hot_sessions,
        threads=settings.threads,
        metrics=metrics,
        policies=policies,
        tabular=learners,
    )


def _choose_device(settings: Settings) -> str:
    """Return "cuda" or "cpu". Raises StartError for a CUDA device that is not there."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise StartError("IMPRINT_DEVICE is cuda, but this machine has no CUDA device that torch can use")
    return settings.device


def choose_decoder(settings: Settings, backbone: Backbone) -> Backbone:
    """Return the base with the weights that generate, in the number format of the settings."""
    return backbone.fp16_decoder(choose_decode_step(backbone)) if settings.decode_dtype == "fp16" else backbone


def choose_memory(settings: Settings, hidden_size: int, base: str) -> Memory:
    """Return the memory of the settings, or the one fitted to the base or shipped for it, or else a random one.

    base: the base's fingerprint. Raises MemoryConfigError.
    """
    fitted = fitted_memory_path(settings.cache_dir, base)
    if settings.memory == "default" and fitted.exists():
        log.info("serving the memory that `imprint fit` made for this base: %s", fitted)
        return load_memory(fitted, hidden_size=hidden_size)
    with memory_file(settings) as path:
        if path is not None:
            return load_memory(path, hidden_size=hidden_size)
    log.warning(
        "no memory is shipped for %s: serving an unfitted one. `imprint fit %s` makes a better one in minutes; run it"
        " before sessions learn, since they cannot be used with another memory",
        settings.model,
        settings.model,
    )
    return random_memory(default_config(hidden_size), seed=0)


def memory_kind(model: str, cache_dir: Path, base: str) -> Literal["shipped", "fitted"] | None:
    """Return which memory a base has by default; None for an unfitted one. base: the base's fingerprint."""
    if fitted_memory_path(cache_dir, base).exists():
        return "fitted"
    return "shipped" if shipped_name(model) else None


def shipped_name(model: str) -> str | None:
    """Return the name of the memory that is shipped for a base, whatever file or folder holds it; None without one.

    model: a name, also of a model hub, or a path. A memory reads a base's states, which quantising changes little.
    """
    name = model.rpartition("/")[2].lower()
    return next((base for base in SHIPPED_MEMORIES if name.startswith(base)), None)


def shipped_memory() -> Memory:
    """Return the memory that is shipped for the default base."""
    with as_file(files("model") / "checkpoints" / f"{DEFAULT_BASE}.safetensors") as path:
        return load_memory(path, hidden_size=DEFAULT_HIDDEN_SIZE)


def fitted_memory_path(cache_dir: Path, base: str) -> Path:
    """Return the file of the memory that `imprint fit` makes for the base with this fingerprint."""
    return cache_dir / "memories" / f"{base.removeprefix('sha256:')[:16]}.safetensors"


@contextmanager
def memory_file(settings: Settings) -> Iterator[Path | None]:
    """Yield the checkpoint of the memory that the settings name or that is shipped for the base; None without one."""
    if settings.memory != "default":
        yield Path(settings.memory)
    elif name := shipped_name(settings.model):
        with as_file(files("model") / "checkpoints") as folder:
            yield folder / f"{name}.safetensors"
    else:
        yield None


def load_reading_prefix(
    settings: Settings, config: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> ReadingPrefix | None:
    """Return the reading prefix that lies beside the checkpoint of the memory, if one does: the same name, with the
    ending `.reading.safetensors`. Raises MemoryConfigError."""
    with memory_file(settings) as path:
        beside = path and path.with_suffix(PREFIX_SUFFIX)
        if beside is None or not beside.is_file():
            return None
        return load_prefix(beside, config, device=device, dtype=dtype)


def choose_policies(settings: Settings) -> list[Policy]:
    """Return the policies of the settings, or all shipped ones. Raises StartError for two policies of one name."""
    if settings.policies == "default":
        with as_file(files("model") / "checkpoints" / "policies") as folder:
            policies = [load_policy(path) for path in sorted(folder.glob("*.safetensors"))]
    else:
        paths = [] if settings.policies == "none" else settings.policies.split(",")
        policies = [load_policy(Path(path.strip())) for path in paths]
    names = [policy.config.name for policy in policies]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise StartError(f"IMPRINT_POLICIES: two policies are called {min(duplicates)!r}")
    return policies


def choose_learners(settings: Settings) -> list[AnyLearner]:
    """Return the learners of tables; none where the settings want no policies."""
    return [] if settings.policies == "none" else [new_learner(tabular_config(task, task)) for task in get_args(Task)]


def served_name(policy: Policy, taken: Container[str]) -> str:
    """Return the name by which a policy is served: its own, and its number of actions where that name is taken."""
    name = policy.config.name
    return f"{name}-{policy.config.actions}" if name in taken else name


def _kv_tokens(backbone: Backbone, context: int) -> int:
    """Return the number of key-value cache tokens for a share of the free memory, at least one request's."""
    bytes_per_token = backbone.new_cache(context).nbytes // context
    free_bytes = psutil.virtual_memory().available
    if backbone.embedding.is_cuda:
        free_bytes = torch.cuda.mem_get_info()[0]
    return max(context, int(KV_SHARE * free_bytes) // bytes_per_token)


def _watch_device(metrics: Metrics, device: str) -> None:
    """Make the metrics measure the device whenever the metrics are read."""

    def free_bytes() -> int:
        return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available

    name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    metrics.device_info.info({"kind": device, "name": name})
    total = torch.cuda.mem_get_info()[1] if device == "cuda" else psutil.virtual_memory().total
    metrics.device_memory_bytes.set(total)
    metrics.device_memory_used_bytes.set_function(lambda: total - free_bytes())
