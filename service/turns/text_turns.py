"""The turns that learn or score a text of any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from service.engine import Event, TokenScores
from service.turns import prompts
from service.turns.commit import TurnOutcome, TurnPlan
from service.turns.loaded_model import LoadedModel
from service.turns.prompts import ChatPrompt, TextPrompt
from service.turns.run import Json, Turn
from service.turns.session_gate import SessionHandle, SessionTarget
from service.types import Adaptation


@dataclass(frozen=True)
class ObserveResult:
    """The outcome of a learning turn.

    loss: nats per token, before the tokens were learned. predictions: of the examples, if the request wants them.
    """

    tokens_learned: int
    rows_written: int
    loss: float | None
    version: int
    predictions: list[Json] | None = None

    @classmethod
    def of(cls, adaptation: Adaptation) -> ObserveResult:
        """Return what a turn that only learns did."""
        return cls(adaptation.tokens_learned, adaptation.rows_written, adaptation.loss, adaptation.version_to)


@dataclass(frozen=True)
class ScoreResult:
    """Log-probabilities in nats with and without the session's memory; losses are means per token."""

    tokens: list[str]
    logprobs: list[float]
    frozen_logprobs: list[float]
    loss: float | None
    frozen_loss: float | None
    version: int


class LearningTurn(Turn[ObserveResult]):
    """A turn whose only event says what the turn learned; a subclass plans what to learn."""

    def replayed(self, record: Json) -> Iterable[ObserveResult]:
        return [ObserveResult(**record)]

    def last_event(self, outcome: TurnOutcome) -> ObserveResult:
        return ObserveResult.of(outcome.adaptation)

    def record(self, last: ObserveResult) -> Json:
        return asdict(last)


class ObserveTurn(LearningTurn):
    """Learns a text; of a chat, only the messages that the session has not seen."""

    def __init__(
        self,
        session: str,
        prompt: TextPrompt | ChatPrompt,
        if_match: str | None,
        recall: bool | None = None,
        source: str | None = None,
    ) -> None:
        self.target = SessionTarget(session, if_match=if_match)
        self._session, self._prompt, self._recall, self._source = session, prompt, recall, source

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        meta = handle.meta or model.new_meta(self._session, {})
        model.require_model(meta)
        encoded = await prompts.encode_text(self._prompt, model.tokenizer, meta.digests)
        start = model.tokenizer.start_token_id
        segments = await prompts.segments_async(encoded, model.context, start, learn=True, score=False)
        keep = model.keeps_episodes(handle.ctx.tenant, meta.options, self._recall)
        return TurnPlan(meta, segments, digests=encoded.digests, keep_episodes=keep, source=self._source)


class ScoreTurn(Turn[ScoreResult]):
    """Scores each token of a text with memory and without; learns each block after its score, if asked to."""

    def __init__(self, session: str, text: str, learn: bool, if_match: str | None, recall: bool | None = None) -> None:
        self.target = SessionTarget(session, "always" if learn else "never", if_match)
        self._session, self._text, self._learn, self._recall = session, text, learn, recall

    def replayed(self, record: Json) -> Iterable[ScoreResult]:
        return [ScoreResult(**record)]

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        meta = handle.meta or model.new_meta(self._session, {})
        model.require_model(meta)
        prompts.require_few_logprobs(model.tokenizer.fewest_tokens(len(self._text)), "text")
        encoded = await prompts.encode_text(TextPrompt(self._text), model.tokenizer, meta.digests)
        prompts.require_few_logprobs(len(encoded.token_ids), "text")
        start = model.tokenizer.start_token_id
        segments = await prompts.segments_async(encoded, model.context, start, learn=self._learn, score=True)
        self._scores = list[TokenScores]()
        self._token_ids, self._token_bytes = encoded.token_ids, model.tokenizer.token_bytes
        keep = model.keeps_episodes(handle.ctx.tenant, meta.options, self._recall)
        if keep:
            segments = [replace(segment, recall=model.recall.newest()) for segment in segments]
        return TurnPlan(meta, segments, writes=self._learn, score_frozen=True, keep_episodes=keep)

    def outputs(self, segment: int, event: Event) -> Iterator[ScoreResult]:
        if isinstance(event, TokenScores):
            self._scores.append(event)
        return iter(())

    def last_event(self, outcome: TurnOutcome) -> ScoreResult:
        adapted = [value for event in self._scores for value in event.adapted]
        frozen = [value for event in self._scores for value in event.frozen or ()]
        tokens = [self._token_bytes(token_id).decode(errors="replace") for token_id in self._token_ids]
        version = outcome.adaptation.version_to
        return ScoreResult(tokens, adapted, frozen, _mean_loss(adapted), _mean_loss(frozen), version)

    def record(self, last: ScoreResult) -> Json:
        return vars(last)


def _mean_loss(log_probs: Sequence[float]) -> float | None:
    return -sum(log_probs) / len(log_probs) if log_probs else None
