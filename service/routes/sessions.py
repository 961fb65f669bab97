"""Imprint's own routes: sessions, and observing and scoring text with their memory."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.replies import Observed, Scored, Session, SessionDeleted, SessionList
from service.routes import ERRORS, Caller, IfMatch, ServerSessions, V1Route, until_disconnect
from service.schemas import SESSION_ID, ObserveRequest, ScoreRequest, SessionId, SessionOptions
from service.sessions import ChatPrompt, TextPrompt
from service.store.types import SessionMeta

ETAG: dict[str, Any] = {"ETag": {"schema": {"type": "string"}, "description": 'The version, as `"v3"`.'}}

router = APIRouter(prefix="/v1/sessions", route_class=V1Route, responses=ERRORS, tags=["Sessions"])

PathId = Annotated[SessionId, Path(alias="id", description="The session's id.", examples=["alice"])]


class Page(BaseModel):
    """Which part of the list of sessions."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)
    after: str = Field(
        "", pattern=rf"^$|{SESSION_ID}", description="Only ids after this one: `next` of the page before."
    )


@router.get("")
async def list_sessions(page: Annotated[Page, Query()], tenant: Caller, sessions: ServerSessions) -> SessionList:
    """The sessions, ordered by id, page by page."""
    metas, next_id = await sessions.list(tenant, page.after, page.limit)
    return SessionList(
        object="list", data=[_session(meta) for meta in metas], has_more=next_id is not None, next=next_id
    )


@router.put("/{id}", responses={200: {"headers": ETAG}, 201: {"model": Session, "headers": ETAG}})
async def put_session(
    session: PathId,
    tenant: Caller,
    sessions: ServerSessions,
    response: Response,
    body: SessionOptions | None = None,
    if_match: IfMatch = None,
) -> Session:
    """Creates the session, or replaces the options of the one there is."""
    options = {} if body is None else body.model_dump(exclude_none=True)
    meta, created = await sessions.put(tenant, session, options, if_match=if_match)
    response.status_code = 201 if created else 200
    response.headers["ETag"] = _etag(meta)
    return _session(meta)


@router.get("/{id}", responses={200: {"headers": ETAG}})
async def get_session(session: PathId, tenant: Caller, sessions: ServerSessions, response: Response) -> Session:
    """What the session holds and what it is worth."""
    meta = await sessions.get(tenant, session)
    response.headers["ETag"] = _etag(meta)
    return _session(meta)


@router.delete("/{id}")
async def delete_session(
    session: PathId, tenant: Caller, sessions: ServerSessions, if_match: IfMatch = None
) -> SessionDeleted:
    """Erases the session and all it has learned."""
    await sessions.delete(tenant, session, if_match=if_match)
    return SessionDeleted(id=session, object="session", deleted=True)


@router.post("/{id}/observe")
async def observe(
    session: PathId,
    tenant: Caller,
    body: ObserveRequest,
    request: Request,
    sessions: ServerSessions,
    if_match: IfMatch = None,
) -> Observed:
    """Learns a text or a chat of any length, without answering."""
    prompt = (
        TextPrompt(body.text)
        if body.text is not None
        else ChatPrompt([message.plain() for message in body.messages or []])
    )
    work = sessions.observe(tenant, session, prompt, if_match=if_match)
    return Observed(**asdict(await until_disconnect(request.receive, work)))


@router.post("/{id}/score")
async def score(
    session: PathId,
    tenant: Caller,
    body: ScoreRequest,
    request: Request,
    sessions: ServerSessions,
    if_match: IfMatch = None,
) -> Scored:
    """How well the session predicts a text, beside the frozen model; learns it only if asked, after that."""
    work = sessions.score(tenant, session, body.text, learn=body.learn, if_match=if_match)
    return Scored(**asdict(await until_disconnect(request.receive, work)))


def _etag(meta: SessionMeta) -> str:
    return f'"v{meta.version}"'


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
