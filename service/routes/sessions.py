"""Imprint's own routes: sessions, and observing and scoring text with their memory."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.policies import Policies
from service.replies import LogEntry, Observed, Scored, Session, SessionDeleted, SessionList, SessionLog
from service.routes import (
    ERRORS,
    FileRoute,
    IfMatch,
    Lesson,
    RequestCall,
    RequestLesson,
    ServerSessions,
    ServerVersions,
    V1Route,
    etag,
)
from service.schemas import SESSION_ID, Fork, ObserveRequest, Rollback, ScoreRequest, SessionId, SessionOptions
from service.sessions import ChatPrompt, ObserveResult, TextPrompt
from service.store.types import SessionMeta

ETAG: dict[str, Any] = {"ETag": {"schema": {"type": "string"}, "description": 'The version, as `"v3"`.'}}

TAGGED: dict[int | str, dict[str, Any]] = {200: {"headers": ETAG}}
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

    limit: int = Field(100, ge=1, le=1000)
    after: str = Field(
        "", pattern=rf"^$|{SESSION_ID}", description="Only ids after this one: `next` of the page before."
    )


class LogPage(BaseModel):
    """Which part of a session's log."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)
    before: int | None = Field(None, ge=1, description="Only versions before this one: `next` of the page before.")


@router.get("")
async def list_sessions(page: Annotated[Page, Query()], sessions: ServerSessions, call: RequestCall) -> SessionList:
    """The sessions, ordered by id, page by page."""
    metas, next_id = await sessions.list(call.tenant, page.after, page.limit)
    return SessionList(
        object="list", data=[_session(meta) for meta in metas], has_more=next_id is not None, next=next_id
    )


@router.put("/{id}", responses={200: {"headers": ETAG}, 201: {"model": Session, "headers": ETAG}})
async def put_session(
    session: PathId,
    sessions: ServerSessions,
    call: RequestCall,
    response: Response,
    body: SessionOptions | None = None,
    if_match: IfMatch = None,
) -> Session:
    """Creates the session, or replaces the options of the one there is."""
    options = {} if body is None else body.model_dump(exclude_none=True)
    model = options.pop("model", "")
    meta, created = await sessions.put(call.tenant, session, options, model=model, if_match=if_match)
    response.status_code = 201 if created else 200
    response.headers["ETag"] = etag(meta.version)
    return _session(meta)


@router.get("/{id}", responses={200: {"headers": ETAG}})
async def get_session(session: PathId, sessions: ServerSessions, call: RequestCall, response: Response) -> Session:
    """What the session holds and what it is worth."""
    meta = await sessions.get(call.tenant, session)
    response.headers["ETag"] = etag(meta.version)
    return _session(meta)


@router.delete("/{id}")
async def delete_session(
    session: PathId, sessions: ServerSessions, call: RequestCall, if_match: IfMatch = None
) -> SessionDeleted:
    """Erases the session and all it has learned."""
    await sessions.delete(call.tenant, session, if_match=if_match)
    return SessionDeleted(id=session, object="session", deleted=True)


@router.post("/{id}/observe")
async def observe(
    session: PathId,
    body: ObserveRequest,
    sessions: ServerSessions,
    lesson: RequestLesson,
) -> Observed:
    """Learns a text or a chat of any length, without answering; or the label of an example (policies)."""
    if body.features is not None and body.label is not None:
        label, policies = body.label, Policies(sessions)
        work = policies.observe(lesson.call, session, body.model, body.features, label, if_match=lesson.if_match)
        return _observed(await lesson.unless_left(work, body.on_disconnect), lesson)
    prompt = (
        TextPrompt(body.text)
        if body.text is not None
        else ChatPrompt([message.plain() for message in body.messages or []])
    )
    work = sessions.observe(lesson.call, session, prompt, if_match=lesson.if_match)
    return _observed(await lesson.unless_left(work, body.on_disconnect), lesson)


@router.post("/{id}/score")
async def score(
    session: PathId,
    body: ScoreRequest,
    sessions: ServerSessions,
    lesson: RequestLesson,
) -> Scored:
    """How well the session predicts a text, beside the frozen model; learns it only if asked, after that."""
    work = sessions.score(lesson.call, session, body.text, learn=body.learn, if_match=lesson.if_match)
    done = await lesson.unless_left(work, body.on_disconnect)
    lesson.tag(done.version)
    return Scored(**asdict(done))


@router.get("/{id}/log")
async def read_log(
    session: PathId, page: Annotated[LogPage, Query()], versions: ServerVersions, call: RequestCall
) -> SessionLog:
    """What was learned when: the newest commits first."""
    entries, before = await versions.log(call.tenant, session, before=page.before, limit=page.limit)
    data = [LogEntry(**entry) for entry in entries]
    return SessionLog(object="list", data=data, has_more=before is not None, next=before)


@router.post("/{id}/rollback", responses=TAGGED)
async def roll_back(
    session: PathId,
    body: Rollback,
    versions: ServerVersions,
    lesson: RequestLesson,
) -> Session:
    """Makes a new version that is what an earlier one was, bit for bit."""
    return _told(await versions.rollback(lesson.call, session, body.version, if_match=lesson.if_match), lesson)


@router.post("/{id}/unlearn", responses=TAGGED)
async def unlearn(
    session: PathId,
    body: Rollback,
    versions: ServerVersions,
    lesson: RequestLesson,
) -> Session:
    """Makes a new version as if one had never been learned; needs the later texts to be kept (option `keep_text`)."""
    work = versions.unlearn(lesson.call, session, body.version, if_match=lesson.if_match)
    return _told(await lesson.unless_left(work), lesson)


@router.post("/{id}/fork", status_code=201, responses={201: {"headers": ETAG}})
async def fork(
    session: PathId,
    body: Fork,
    versions: ServerVersions,
    lesson: RequestLesson,
) -> Session:
    """Makes a new session that has learned the same; from then on they go their own ways."""
    return _told(await versions.fork(lesson.call, session, body.id, if_match=lesson.if_match), lesson)


@router.get("/{id}/export", response_class=Response, responses=EXPORTED)
async def export(session: PathId, versions: ServerVersions, call: RequestCall) -> Response:
    """The session as a safetensors file with a manifest, for `PUT …/import` here or elsewhere."""
    data, meta = await versions.export(call.tenant, session)
    headers = {"ETag": etag(meta.version), "Content-Disposition": 'attachment; filename="session.safetensors"'}
    return Response(data, headers=headers, media_type=FILE)


@files.put("/{id}/import", responses={**TAGGED, 201: {"model": Session, "headers": ETAG}}, openapi_extra=IMPORTED)
async def bring(
    session: PathId,
    versions: ServerVersions,
    lesson: RequestLesson,
) -> Session:
    """Gives the session what an export holds, in place of what it had; all of the file is verified before."""
    data = await lesson.request.body()
    meta, created = await versions.bring(lesson.call, session, data, if_match=lesson.if_match)
    lesson.response.status_code = 201 if created else 200
    return _told(meta, lesson)


def _observed(done: ObserveResult, lesson: Lesson) -> Observed:
    lesson.tag(done.version)
    return Observed(**asdict(done))


def _told(meta: SessionMeta, lesson: Lesson) -> Session:
    lesson.tag(meta.version)
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
