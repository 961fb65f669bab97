"""`imprint eval --probes code`: what an editor would suggest in the next file of a repository whose files were learned.

The documents of each text are the files of a repository, in order. A file is read after the ones before it were
learned, and it is learned itself afterwards. At random places in it, the rest of the line (within a line) or the whole
line (at its start) is to be suggested from the text around. All prompts fill in the middle and have at most
`PROMPT_TOKENS` tokens, with or without parts of earlier files.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM
from model.text.infill import InfillTokens, Snippet
from research.corpus import RECORD_SEPARATOR, load_model, progress_bar, text_files
from research.evaluation.prequential import new_pool
from research.evaluation.recall.memory import MemoryArm
from research.evaluation.recall.search import BM25
from research.evaluation.recall.speaker import Prefilled, Speaker
from research.evaluation.report import markdown, print_tables
from research.machine import hardware
from service.errors import CommandError
from service.model_loading import choose_decoder
from service.settings import Settings

FILES = 20  # learned before the first suggestion
TESTED_FILES = 2  # of each repository, in which suggestions are made
POINTS = 8  # in each of these files: half of them within lines, half at the starts of lines
FILE_CHARS = 8_000  # of a file that are read, at most
MIN_LINES = 20  # of a file in which suggestions are made
PROMPT_TOKENS = 512
SNIPPET_TOKENS = 256  # of these for parts of earlier files, where the arm has any
SNIPPET_LINES = 12
SNIPPETS = 4
QUERY_LINES = 6  # before the place, by which the parts are found
MAX_TOKENS = 24
ARMS = {
    "frozen": ("frozen base", False, False),
    "memory": ("memory", True, False),
    "filled": ("frozen base, BM25 snippets in the prompt", False, True),
    "both": ("memory, BM25 snippets in the prompt", True, True),
}  # title, whether the memory is read, whether the prompt has parts of earlier files


@dataclass(frozen=True)
class Point:
    """A place in a file: the text before and after it, and the line's text that is to be suggested."""

    before: str
    after: str
    rest: str
    at_start: bool


@dataclass(frozen=True)
class Suggestion:
    """The value of what an arm suggested at a place.

    Attributes:
        exact: whether its first line is the rest of the line.
        saved: characters of it that are right before the first wrong one.
        characters: of the rest of the line.
        seconds: from the prompt to the whole suggestion.
    """

    arm: str
    at_start: bool
    exact: bool
    saved: int
    characters: int
    seconds: float


def choose_points(text: str, number: int, rng: random.Random) -> list[Point]:
    """Return up to `number` places in the second half of a file, alternately within a line and at its start."""
    starts = [match.start() for match in re.finditer(r"^(?=[ \t]*\S)", text, re.MULTILINE)]
    chosen = rng.sample(starts[len(starts) // 2 :], min(number, len(starts) // 2))
    found = []
    for index, start in enumerate(chosen):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        indent = len(text[start:end]) - len(text[start:end].lstrip())
        inside = range(start + indent + 1, end)
        at = rng.choice(inside) if index % 2 and len(inside) else start
        found.append(Point(text[:at], text[end:], text[at:end], at == start))
    return found


def rated(arm: str, point: Point, text: str, seconds: float) -> Suggestion:
    """Return the value of a suggested text, of which the first line counts."""
    line = text.split("\n")[0].rstrip()
    rest = point.rest.rstrip()
    common = next((i for i, (a, b) in enumerate(zip(line, rest, strict=False)) if a != b), min(len(line), len(rest)))
    return Suggestion(arm, point.at_start, line == rest, common, len(rest), seconds)


class CodeProbe:
    """One repository: its learned files, as a memory and as an index of their parts."""

    def __init__(self, lm: AdaptiveLM, speaker: Speaker, tokens: InfillTokens) -> None:
        self._lm, self._speaker, self._tokens = lm, speaker, tokens
        self._memory, self._index, self._parts = MemoryArm(speaker), BM25(), list[str]()
        self._empty = new_pool(lm)

    def learn(self, text: str) -> None:
        """Learn a file."""
        self._memory.teach_text(text)
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), SNIPPET_LINES):
            self._parts.append("".join(lines[start : start + SNIPPET_LINES]))
            self._index.add(self._parts[-1])

    def suggest(self, point: Point) -> Iterator[Suggestion]:
        """Yield the suggestion of each arm at a place. A prompt is read once for the arms that have it in common: the
        memory has its place at the output."""
        for fills in (False, True):
            started = time.perf_counter()
            prompt = self._prompt(point, fills)
            cache, state = self._speaker.read(prompt, len(prompt) + MAX_TOKENS, self._empty, EMPTY_SESSION)
            read = cache, state.following(self._speaker.encode(point.before[-200:]))
            reading_s = time.perf_counter() - started
            for arm in (arm for arm in ARMS if ARMS[arm][2] == fills):
                started = time.perf_counter()
                text = self._text(prompt, read, ARMS[arm][1])
                yield rated(arm, point, text, reading_s + time.perf_counter() - started)

    def _prompt(self, point: Point, fills: bool) -> list[int]:
        """Return the prompt of a place; parts of earlier files have `SNIPPET_TOKENS` of it at most."""
        extra = list[Snippet]()
        if fills:
            query = "".join(point.before.splitlines(keepends=True)[-QUERY_LINES:])
            best = self._index.rank(query, SNIPPETS)
            extra = [Snippet(self._parts[number], "other") for number in reversed(best)]
        room = PROMPT_TOKENS - SNIPPET_TOKENS if fills else PROMPT_TOKENS
        tokenizer = self._speaker.tokenizer
        around = self._tokens.prompt(tokenizer, point.before, point.after, [], room)
        before, after = (tokenizer.decode(around.token_ids[slice(*span)]) for span in (around.prefix, around.suffix))
        return self._tokens.prompt(tokenizer, before, after, extra, PROMPT_TOKENS).token_ids.tolist()

    def _text(self, prompt: list[int], read: Prefilled, reads_memory: bool) -> str:
        """Return what follows a prompt that was read."""
        memory, (cache, state) = self._memory, read
        pool, session = (memory.pool, memory.session) if reads_memory else (self._empty, EMPTY_SESSION)

        def prefilled(ids: list[int], capacity: int) -> Prefilled:
            return cache.fork(capacity), state

        (text,) = self._speaker.prefilled_texts([prompt], MAX_TOKENS, prefilled, pool, session, ends=self._tokens.ends)
        return text


def evaluate_code(settings: Settings, paths: Sequence[Path], out: Path) -> None:
    """Run the probe, and write code.json and code.md. Raises CommandError."""
    lm, tokenizer = load_model(settings)
    tokens = InfillTokens.of(tokenizer)
    if tokens is None:
        raise CommandError(f"the base {settings.model} has no tokens for filling in the middle")
    decoder = choose_decoder(settings, lm.backbone)
    speaker = Speaker(AdaptiveLM(lm.backbone, lm.memory, decoder=decoder), tokenizer)
    found: dict[str, list[Suggestion]] = {}
    repositories = [(path, path.read_text("utf-8").split(RECORD_SEPARATOR)) for path, _ in text_files(paths)]
    with progress_bar() as bar:
        for path, files in repositories:
            task = bar.add_task(path.stem, total=FILES + TESTED_FILES)
            found[path.stem] = []
            for suggestions in run(CodeProbe(lm, speaker, tokens), files, random.Random(0)):
                found[path.stem] += suggestions
                bar.advance(task)
    if not any(found.values()):
        raise CommandError(f"a repository needs more than {FILES} files, and lines in the next ones")
    about = {"model": Path(settings.model).name, "memory": lm.memory.fingerprint(), "machine": hardware()}
    about["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    out.mkdir(parents=True, exist_ok=True)
    results = about | {name: [asdict(each) for each in suggestions] for name, suggestions in found.items()}
    (out / "code.json").write_text(json.dumps(results, indent=1))
    every = [suggestion for suggestions in found.values() for suggestion in suggestions]
    given = table(every)
    (out / "code.md").write_text(f"{about['date']}; {about['machine']}; base {about['model']}\n" + markdown([given]))
    print_tables([given])


def run(probe: CodeProbe, files: Sequence[str], rng: random.Random) -> Iterator[list[Suggestion]]:
    """Yield the suggestions in each file of a repository; none for those that are only learned."""
    tested = 0
    for number, text in enumerate(text[:FILE_CHARS] for text in files):
        suggestions = list[Suggestion]()
        if number >= FILES and text.count("\n") >= MIN_LINES:
            tested += 1
            suggestions = [one for point in choose_points(text, POINTS, rng) for one in probe.suggest(point)]
        yield suggestions
        if tested == TESTED_FILES:
            return
        probe.learn(text)


def table(suggestions: Sequence[Suggestion]) -> tuple[str, list[str], list[list[str]]]:
    """Return the table of the arms."""
    by_arm: dict[str, list[Suggestion]] = defaultdict(list)
    for suggestion in suggestions:
        by_arm[suggestion.arm].append(suggestion)
    rows = [[ARMS[arm][0], *_figures(of)] for arm, of in by_arm.items()]
    places_tried = len(suggestions) // len(ARMS)
    columns = ["arm", "exact rest of the line", "exact line", "characters saved", "seconds, median"]
    return f"Suggestions at {places_tried} places, after {FILES} files or more", columns, rows


def _figures(suggestions: Sequence[Suggestion]) -> list[str]:
    inside = [each.exact for each in suggestions if not each.at_start]
    starts = [each.exact for each in suggestions if each.at_start]
    saved: Any = sum(each.saved for each in suggestions) / max(1, sum(each.characters for each in suggestions))
    shares = [f"{mean(part):.0%} of {len(part)}" if part else "–" for part in (inside, starts)]
    return [*shares, f"{saved:.1%}", f"{median(each.seconds for each in suggestions):.2f}"]
