"""Imprint's own routes: sessions, their versions, and observing and scoring text with their memory."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.concurrency import LARGE, dump_json_pieces, run_off_loop
from service.http.dependencies import (
    IfMatch,
    LargeReply,
    LearningRequest,
    LearningRequestDep,
    PathId,
    RequestContextDep,
    SessionsDep,
    VersionsDep,
    ViewsDep,
    etag,
)
from service.http.json_route import FileRoute, JsonRoute
from service.http.openapi import ERROR_RESPONSES, ETAG_HEADER, ETAG_RESPONSES, FILE_CONTENT, FILE_TYPE, Responses
from service.http.queries import EpisodePage, LogPage, Page, Span
from service.http.replies import (
    LogEntry,
    Observed,
    RowChange,
    Scored,
    Session,
    SessionCells,
    SessionDeleted,
    SessionDiff,
    SessionEpisode,
    SessionEpisodes,
    SessionList,
    SessionLog,
    SiteCells,
)
from service.http.schemas import (
    Fork,
    ObserveRequest,
    Rollback,
    ScoreRequest,
    SessionOptions,
    Unlearn,
)
from service.http.sse import until_disconnect
from service.store.base import SessionMeta
from service.turns.policy_turns import PolicyOperations
from service.turns.prompts import ChatPrompt, TextPrompt
from service.turns.tabular_requests import Batch, ExampleInput
from service.turns.text_turns import ObserveResult, ScoreResult
from service.versions.views import EpisodeFilter

CREATED: Responses = {201: {"model": Session, "headers": ETAG_HEADER}}
EXPORTED: Responses = {200: {**FILE_CONTENT, "headers": ETAG_HEADER, "description": "The file."}}
IMPORTED = {"requestBody": {**FILE_CONTENT, "required": True}}

LARGE_SCORE = 4096  # tokens
LARGE_BATCH = 8  # predictions
LOGPROBS = ("logprobs", "frozen_logprobs")

router = APIRouter(prefix="/v1/sessions", route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["Sessions"])
files = APIRouter(prefix="/v1/sessions", route_class=FileRoute, responses=ERROR_RESPONSES, tags=["Sessions"])


@router.get("", summary="List sessions")
async def list_sessions(page: Annotated[Page, Query()], sessions: SessionsDep, ctx: RequestContextDep) -> SessionList:
    """List the sessions page by page, ordered by id."""
    metas, next_id = await sessions.list(ctx.tenant, page.after, page.limit)
    return SessionList(
        object="list", data=[_session(meta) for meta in metas], has_more=next_id is not None, next=next_id
    )


@router.put(
    "/{id}",
    summary="Create a session or set its options",
    responses=ETAG_RESPONSES | CREATED,
)
async def put_session(
    session: PathId,
    sessions: SessionsDep,
    ctx: RequestContextDep,
    response: Response,
    body: SessionOptions | None = None,
    if_match: IfMatch = None,
) -> Session:
    """Create the session, or replace the options of a session that exists."""
    options = {} if body is None else body.model_dump(exclude_none=True)
    model = options.pop("model", "")
    meta, created = await sessions.put(ctx.tenant, session, options, model=model, if_match=if_match)
    response.status_code = 201 if created else 200
    response.headers["ETag"] = etag(meta.version)
    return _session(meta)


@router.get("/{id}", summary="Describe a session", responses=ETAG_RESPONSES)
async def get_session(session: PathId, sessions: SessionsDep, ctx: RequestContextDep, response: Response) -> Session:
    """Describe the session: its version, the size of its memory, and the gain of the memory over the frozen base."""
    meta = await sessions.get(ctx.tenant, session)
    response.headers["ETag"] = etag(meta.version)
    return _session(meta)


@router.delete("/{id}", summary="Erase a session")
async def delete_session(
    session: PathId, sessions: SessionsDep, ctx: RequestContextDep, if_match: IfMatch = None
) -> SessionDeleted:
    """Erase the session and everything that the session has learned."""
    await sessions.delete(ctx.tenant, session, if_match=if_match)
    return SessionDeleted(id=session, object="session", deleted=True)


@router.post("/{id}/observe", summary="Learn a text, a chat or examples", response_model=Observed)
async def observe(session: PathId, body: ObserveRequest, learning: LearningRequestDep) -> Observed | Response:
    """Learn a text or a chat of any length without generating; or learn the label or the target of an example, or of
    several (policies)."""
    if body.features is not None or body.examples is not None:
        policies = PolicyOperations(learning.sessions)
        examples = [ExampleInput(each.features, each.label, each.target) for each in body.batch]
        work = policies.observe(
            learning.ctx,
            session,
            body.model,
            Batch(examples, body.examples is not None),
            predict=bool(body.predict),
            if_match=learning.if_match,
        )
        return await _observed(await until_disconnect(learning.request.receive, work, body.on_disconnect), learning)
    prompt = (
        TextPrompt(body.text)
        if body.text is not None
        else ChatPrompt(
            [message.plain() for message in body.messages or []], learn_tool_results=bool(body.learn_tool_results)
        )
    )
    work = learning.sessions.observe(
        learning.ctx, session, prompt, if_match=learning.if_match, recall=body.recall, source=body.source
    )
    return await _observed(await until_disconnect(learning.request.receive, work, body.on_disconnect), learning)


@router.post("/{id}/score", summary="Score a text", response_model=Scored)
async def score(session: PathId, body: ScoreRequest, learning: LearningRequestDep) -> Scored | Response:
    """Score a text with the session's memory and with the frozen base; with `learn`, learn each part of the text after
    it is scored."""
    work = learning.sessions.score(
        learning.ctx, session, body.text, learn=body.learn, if_match=learning.if_match, recall=body.recall
    )
    done = await until_disconnect(learning.request.receive, work, body.on_disconnect)
    learning.set_reply_headers(done.version)
    if len(done.logprobs) < LARGE_SCORE:
        return Scored(**vars(done))
    return LargeReply(await run_off_loop(LARGE, _large_score, done), learning.response)


@router.get("/{id}/log", summary="List the commits of a session")
async def read_log(
    session: PathId, page: Annotated[LogPage, Query()], versions: VersionsDep, ctx: RequestContextDep
) -> SessionLog:
    """List the commits of the session, the newest first."""
    entries, before = await versions.log(
        ctx.tenant, session, before=page.before, limit=page.limit, with_texts=page.text
    )
    data = [LogEntry(**entry) for entry in entries]
    return SessionLog(object="list", data=data, has_more=before is not None, next=before)


@router.get("/{id}/episodes", summary="List what a session can recall")
async def read_episodes(
    session: PathId, page: Annotated[EpisodePage, Query()], views: ViewsDep, ctx: RequestContextDep
) -> SessionEpisodes:
    """List the texts that the session keeps for its replies to read, the newest first."""
    wanted = EpisodeFilter(page.query, page.before, page.asks, page.version)
    episodes, before = await views.episodes(ctx.tenant, session, wanted, page.limit)
    data = [SessionEpisode(**vars(episode)) for episode in episodes]
    return SessionEpisodes(object="list", data=data, has_more=before is not None, next=before)


@router.get("/{id}/cells", summary="Show how full the memory is", responses=ETAG_RESPONSES)
async def read_cells(session: PathId, views: ViewsDep, ctx: RequestContextDep, response: Response) -> SessionCells:
    """Count the rows in each cell of each site of the session's memory."""
    meta, fills = await views.cells(ctx.tenant, session)
    response.headers["ETag"] = etag(meta.version)
    sites = [SiteCells(**asdict(fill)) for fill in fills]
    return SessionCells(object="session.cells", version=meta.version, sites=sites)


@router.get("/{id}/diff", summary="Compare two versions", responses=ETAG_RESPONSES)
async def read_diff(
    session: PathId, span: Annotated[Span, Query()], views: ViewsDep, ctx: RequestContextDep, response: Response
) -> SessionDiff:
    """Compare two versions that are kept: the commits learned and forgotten between them, and the rows that changed."""
    meta, diff = await views.diff(ctx.tenant, session, span.start, span.end)
    response.headers["ETag"] = etag(meta.version)
    return SessionDiff(
        object="session.diff",
        **{"from": span.start, "to": span.end},
        tokens_learned=diff.tokens_learned,
        rows={name: RowChange(**asdict(changes)) for name, changes in diff.rows.items()},
        learned=[LogEntry(**entry) for entry in diff.learned],
        forgotten=[LogEntry(**entry) for entry in diff.forgotten],
    )


@router.post("/{id}/rollback", summary="Go back to a version", responses=ETAG_RESPONSES)
async def roll_back(session: PathId, body: Rollback, versions: VersionsDep, learning: LearningRequestDep) -> Session:
    """Commit a new version that equals an earlier version bit for bit."""
    return _session_reply(
        await versions.rollback(learning.ctx, session, body.version, if_match=learning.if_match), learning
    )


@router.post("/{id}/unlearn", summary="Forget some versions", responses=ETAG_RESPONSES)
async def unlearn(session: PathId, body: Unlearn, versions: VersionsDep, learning: LearningRequestDep) -> Session:
    """Commit a new version as if one or several versions had never been learned.

    Where the version before and the later texts are kept (`keep_text`), the later texts are learned again, and the
    result is exact. Else the rows that came from the versions' texts are removed.
    """
    work = versions.unlearn(learning.ctx, session, body.all_versions, erase=body.erase, if_match=learning.if_match)
    return _session_reply(await until_disconnect(learning.request.receive, work), learning)


@router.post("/{id}/fork", summary="Copy a session", status_code=201, responses={201: {"headers": ETAG_HEADER}})
async def fork(session: PathId, body: Fork, versions: VersionsDep, learning: LearningRequestDep) -> Session:
    """Create a new session with the same memory; from then on the two sessions learn independently."""
    return _session_reply(await versions.fork(learning.ctx, session, body.id, if_match=learning.if_match), learning)


@router.get("/{id}/export", summary="Download a session", response_class=Response, responses=EXPORTED)
async def export(session: PathId, versions: VersionsDep, ctx: RequestContextDep) -> Response:
    """Return the session as a safetensors file with a manifest, for `PUT …/import` on this server or another one."""
    data, meta = await versions.export(ctx.tenant, session)
    headers = {"ETag": etag(meta.version), "Content-Disposition": 'attachment; filename="session.safetensors"'}
    return Response(data, headers=headers, media_type=FILE_TYPE)


@files.put(
    "/{id}/import",
    summary="Upload a session",
    responses=ETAG_RESPONSES | CREATED,
    openapi_extra=IMPORTED,
)
async def bring(session: PathId, versions: VersionsDep, learning: LearningRequestDep) -> Session:
    """Replace the content of the session with an exported file; the whole file is verified first."""
    data = await learning.request.body()
    meta, created = await versions.import_session(learning.ctx, session, data, if_match=learning.if_match)
    learning.response.status_code = 201 if created else 200
    return _session_reply(meta, learning)


def _large_score(done: ScoreResult) -> list[bytes]:
    """Return the pieces of a score as JSON, with null for what is no finite number, as pydantic does."""

    def finite(values: Sequence[float]) -> Iterator[float | None]:
        return (value if isfinite(value) else None for value in values)

    return dump_json_pieces(vars(done) | {name: finite(getattr(done, name)) for name in LOGPROBS})


async def _observed(done: ObserveResult, learning: LearningRequest) -> Observed | Response:
    learning.set_reply_headers(done.version)
    if len(done.predictions or ()) < LARGE_BATCH:
        return Observed(**vars(done))
    return LargeReply(await run_off_loop(LARGE, dump_json_pieces, vars(done)), learning.response)


def _session_reply(meta: SessionMeta, learning: LearningRequest) -> Session:
    learning.set_reply_headers(meta.version)
    return _session(meta)


def _session(meta: SessionMeta) -> Session:
    # An empty memory predicts exactly as the frozen base does: equal sums measure nothing.
    gain_sum = meta.frozen_loss_sum - meta.loss_sum
    gain = gain_sum / meta.proof_tokens if gain_sum else None
    return Session(
        id=meta.id,
        object="session",
        version=meta.version,
        model=meta.model,
        tokens_learned=meta.tokens_learned,
        rows=meta.rows,
        bytes=meta.bytes,
        gain=gain,
        created=int(meta.created),
        updated=int(meta.updated),
        options=meta.options,
    )
