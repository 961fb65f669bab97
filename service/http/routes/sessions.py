"""Imprint's own routes: sessions, and observing and scoring text with their memory."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.http.replies import (
    LogEntry,
    Observed,
    RowChange,
    Scored,
    Session,
    SessionCells,
    SessionDeleted,
    SessionDiff,
    SessionList,
    SessionLog,
    SiteCells,
)
from service.http.routes.common import (
    ERRORS,
    FileRoute,
    IfMatch,
    LearningRequest,
    LearningRequestDep,
    RequestContextDep,
    SessionsDep,
    V1Route,
    VersionsDep,
    ViewsDep,
    etag,
)
from service.http.schemas import SESSION_ID, Fork, ObserveRequest, Rollback, ScoreRequest, SessionId, SessionOptions
from service.store.base import SessionMeta
from service.turns.policy_turns import PolicyTurns
from service.turns.prompts import ChatPrompt, TextPrompt
from service.turns.text_turns import ObserveResult

ETAG: dict[str, Any] = {"ETag": {"schema": {"type": "string"}, "description": 'The version, as `"v3"`.'}}

ETAG_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"headers": ETAG}}
FILE = "application/octet-stream"
BINARY: dict[str, Any] = {"content": {FILE: {"schema": {"type": "string", "format": "binary"}}}}
EXPORTED: dict[int | str, dict[str, Any]] = {200: {**BINARY, "headers": ETAG, "description": "The file."}}
IMPORTED = {"requestBody": {**BINARY, "required": True}}

router = APIRouter(prefix="/v1/sessions", route_class=V1Route, responses=ERRORS, tags=["Sessions"])
files = APIRouter(prefix="/v1/sessions", route_class=FileRoute, responses=ERRORS, tags=["Sessions"])

PathId = Annotated[SessionId, Path(alias="id", description="The session's id.", examples=["alice"])]


class Page(BaseModel):
    """Which part of the list of sessions."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="How many, at most.")
    after: str = Field(
        "", pattern=rf"^$|{SESSION_ID}", description="Only ids after this one: `next` of the page before."
    )


class LogPage(BaseModel):
    """Which part of a session's log."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="How many, at most.")
    before: int | None = Field(None, ge=1, description="Only versions before this one: `next` of the page before.")


class Span(BaseModel):
    """Two versions of a session."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(alias="from", ge=0, examples=[1], description="The version to begin at; 0 = nothing learned.")
    end: int = Field(alias="to", ge=0, examples=[2], description="The version to end at.")


@router.get("", summary="List sessions")
async def list_sessions(page: Annotated[Page, Query()], sessions: SessionsDep, ctx: RequestContextDep) -> SessionList:
    """The sessions, ordered by id, page by page."""
    metas, next_id = await sessions.list(ctx.tenant, page.after, page.limit)
    return SessionList(
        object="list", data=[_session(meta) for meta in metas], has_more=next_id is not None, next=next_id
    )


@router.put(
    "/{id}",
    summary="Create a session or set its options",
    responses={200: {"headers": ETAG}, 201: {"model": Session, "headers": ETAG}},
)
async def put_session(
    session: PathId,
    sessions: SessionsDep,
    ctx: RequestContextDep,
    response: Response,
    body: SessionOptions | None = None,
    if_match: IfMatch = None,
) -> Session:
    """Creates the session, or replaces the options of the one there is."""
    options = {} if body is None else body.model_dump(exclude_none=True)
    model = options.pop("model", "")
    meta, created = await sessions.put(ctx.tenant, session, options, model=model, if_match=if_match)
    response.status_code = 201 if created else 200
    response.headers["ETag"] = etag(meta.version)
    return _session(meta)


@router.get("/{id}", summary="Describe a session", responses={200: {"headers": ETAG}})
async def get_session(session: PathId, sessions: SessionsDep, ctx: RequestContextDep, response: Response) -> Session:
    """What the session holds and what it is worth."""
    meta = await sessions.get(ctx.tenant, session)
    response.headers["ETag"] = etag(meta.version)
    return _session(meta)


@router.delete("/{id}", summary="Erase a session")
async def delete_session(
    session: PathId, sessions: SessionsDep, ctx: RequestContextDep, if_match: IfMatch = None
) -> SessionDeleted:
    """Erases the session and all it has learned."""
    await sessions.delete(ctx.tenant, session, if_match=if_match)
    return SessionDeleted(id=session, object="session", deleted=True)


@router.post("/{id}/observe", summary="Learn a text or a chat")
async def observe(
    session: PathId,
    body: ObserveRequest,
    sessions: SessionsDep,
    learning: LearningRequestDep,
) -> Observed:
    """Learns a text or a chat of any length, without answering; or the label of an example (policies)."""
    if body.features is not None and body.label is not None:
        label, policies = body.label, PolicyTurns(sessions)
        work = policies.observe(learning.ctx, session, body.model, body.features, label, if_match=learning.if_match)
        return _observed(await learning.run_until_disconnect(work, body.on_disconnect), learning)
    prompt = (
        TextPrompt(body.text)
        if body.text is not None
        else ChatPrompt([message.plain() for message in body.messages or []])
    )
    work = sessions.observe(learning.ctx, session, prompt, if_match=learning.if_match)
    return _observed(await learning.run_until_disconnect(work, body.on_disconnect), learning)


@router.post("/{id}/score", summary="Score a text")
async def score(
    session: PathId,
    body: ScoreRequest,
    sessions: SessionsDep,
    learning: LearningRequestDep,
) -> Scored:
    """How well the session predicts a text, beside the frozen model; learns it only if asked, after that."""
    work = sessions.score(learning.ctx, session, body.text, learn=body.learn, if_match=learning.if_match)
    done = await learning.run_until_disconnect(work, body.on_disconnect)
    learning.set_etag(done.version)
    return Scored(**asdict(done))


@router.get("/{id}/log", summary="Tell what was learned when")
async def read_log(
    session: PathId, page: Annotated[LogPage, Query()], versions: VersionsDep, ctx: RequestContextDep
) -> SessionLog:
    """What was learned when: the newest commits first."""
    entries, before = await versions.log(ctx.tenant, session, before=page.before, limit=page.limit)
    data = [LogEntry(**entry) for entry in entries]
    return SessionLog(object="list", data=data, has_more=before is not None, next=before)


@router.get("/{id}/cells", summary="Show how full the memory is", responses=ETAG_RESPONSES)
async def read_cells(session: PathId, views: ViewsDep, ctx: RequestContextDep, response: Response) -> SessionCells:
    """How full the session's memory is: rows held by each cell of each site."""
    meta, fills = await views.cells(ctx.tenant, session)
    response.headers["ETag"] = etag(meta.version)
    sites = [SiteCells(**asdict(fill)) for fill in fills]
    return SessionCells(object="session.cells", version=meta.version, sites=sites)


@router.get("/{id}/diff", summary="Compare two versions", responses=ETAG_RESPONSES)
async def read_diff(
    session: PathId, span: Annotated[Span, Query()], views: ViewsDep, ctx: RequestContextDep, response: Response
) -> SessionDiff:
    """What lies between two versions that are kept: what was learned, what was forgotten, and which rows changed."""
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
async def roll_back(
    session: PathId,
    body: Rollback,
    versions: VersionsDep,
    learning: LearningRequestDep,
) -> Session:
    """Makes a new version that is what an earlier one was, bit for bit."""
    return _session_reply(
        await versions.rollback(learning.ctx, session, body.version, if_match=learning.if_match), learning
    )


@router.post("/{id}/unlearn", summary="Forget one version", responses=ETAG_RESPONSES)
async def unlearn(
    session: PathId,
    body: Rollback,
    versions: VersionsDep,
    learning: LearningRequestDep,
) -> Session:
    """Makes a new version as if one had never been learned; needs the later texts to be kept (option `keep_text`)."""
    work = versions.unlearn(learning.ctx, session, body.version, if_match=learning.if_match)
    return _session_reply(await learning.run_until_disconnect(work), learning)


@router.post("/{id}/fork", summary="Copy a session", status_code=201, responses={201: {"headers": ETAG}})
async def fork(
    session: PathId,
    body: Fork,
    versions: VersionsDep,
    learning: LearningRequestDep,
) -> Session:
    """Makes a new session that has learned the same; from then on they go their own ways."""
    return _session_reply(await versions.fork(learning.ctx, session, body.id, if_match=learning.if_match), learning)


@router.get("/{id}/export", summary="Download a session", response_class=Response, responses=EXPORTED)
async def export(session: PathId, versions: VersionsDep, ctx: RequestContextDep) -> Response:
    """The session as a safetensors file with a manifest, for `PUT …/import` here or elsewhere."""
    data, meta = await versions.export(ctx.tenant, session)
    headers = {"ETag": etag(meta.version), "Content-Disposition": 'attachment; filename="session.safetensors"'}
    return Response(data, headers=headers, media_type=FILE)


@files.put(
    "/{id}/import",
    summary="Upload a session",
    responses={**ETAG_RESPONSES, 201: {"model": Session, "headers": ETAG}},
    openapi_extra=IMPORTED,
)
async def bring(
    session: PathId,
    versions: VersionsDep,
    learning: LearningRequestDep,
) -> Session:
    """Gives the session what an export holds, in place of what it had; all of the file is verified before."""
    data = await learning.request.body()
    meta, created = await versions.import_session(learning.ctx, session, data, if_match=learning.if_match)
    learning.response.status_code = 201 if created else 200
    return _session_reply(meta, learning)


def _observed(done: ObserveResult, learning: LearningRequest) -> Observed:
    learning.set_etag(done.version)
    return Observed(**asdict(done))


def _session_reply(meta: SessionMeta, learning: LearningRequest) -> Session:
    learning.set_etag(meta.version)
    return _session(meta)


def _session(meta: SessionMeta) -> Session:
    gain = (meta.frozen_loss_sum - meta.loss_sum) / meta.proof_tokens if meta.proof_tokens else None
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
