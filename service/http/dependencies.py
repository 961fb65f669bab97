"""The arguments of routes other than the body: parameters, the parts of the server, and the context of a request.

Every dependency is asynchronous and depends on no other dependency: FastAPI runs a synchronous dependency on a thread,
which costs a request about 0.1 ms, and a nested dependency costs half as much.
"""

import re
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Header, Path, Request, Response
from pydantic import AfterValidator
from starlette.types import Receive, Scope, Send

from service.errors import BadRequest, NotFound, PreconditionFailed
from service.http.schemas import SessionId, session_id
from service.metrics import Metrics
from service.turns.idempotency import RequestContext
from service.turns.policy_turns import PolicyOperations
from service.turns.sessions import Sessions
from service.types import AdaptMode
from service.versions.operations import Versions
from service.versions.views import Views

IF_MATCH = r'^(\*|(W/)?"[!#-~]*"([ \t]*,[ \t]*(W/)?"[!#-~]*")*)$'  # RFC 9110 §13.1.1: `*`, or a list of entity tags
IDEMPOTENCY_KEY = r"^[!-~]([ -~]{0,253}[!-~])?$"  # HTTP removes the spaces at both ends


def _entity_tags(value: str | None) -> str | None:
    """Return an `If-Match`. Raises PreconditionFailed for a malformed one, also for a request that was answered before.

    The routes' own check comes after the remembered answers.
    """
    if value is not None and not re.fullmatch(IF_MATCH, value):
        raise PreconditionFailed(
            f"'If-Match' must be the session's ETag, such as \"v3\" with its quotes, or *, got {value[:80]}.",
            param="If-Match",
        )
    return value


PathId = Annotated[SessionId, Path(alias="id", description="The session's id.", examples=["alice"])]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        json_schema_extra={"pattern": IDEMPOTENCY_KEY},
        examples=["5f2b9c04d1e7"],
        description="The server learns from a request with this key once, and repeats the first answer afterwards.",
    ),
]
IfMatch = Annotated[
    str | None,
    AfterValidator(_entity_tags),
    Header(
        alias="If-Match",
        json_schema_extra={"pattern": IF_MATCH},
        examples=['"v3"'],
        description='The `ETag` that the session must still have, such as `"v3"`; else the answer is 412.',
    ),
]

SessionHeader = Annotated[
    SessionId | None,
    Header(alias="X-Imprint-Session", description="Names the session if the body's `session` doesn't."),
]
AdaptHeader = Annotated[
    AdaptMode | None,
    Header(
        alias="X-Imprint-Adapt",
        json_schema_extra={"pattern": "^(both|observe|predict)$"},
        description="The mode if the body's `adapt` doesn't say it.",
    ),
]


@dataclass(frozen=True)
class ClientRules:
    """The server's settings that decide how requests of any client are read.

    Attributes:
        model_names: the names of the language model, the first one for replies.
        any_model: whether every other name is a name of the language model too.
        strict_fields: whether a field without effect is refused, and not ignored.
        user_sessions: whether OpenAI's `user` names a session.
    """

    model_names: tuple[str, ...]
    any_model: bool = False
    strict_fields: bool = False
    user_sessions: bool = False

    def resolve_model(self, model: str | None) -> tuple[AdaptMode | None, str | None]:
        """Return the mode and the session that the name of a model asks for: `NAME`, `NAME:predict`, `NAME@SESSION`.

        A request without a name means the language model, as for vLLM and llama.cpp.

        Raises:
            NotFound: the server has no such model.
            BadRequest: what follows `@` cannot name a session.
        """
        if model is None:
            return None, None
        for name in self.model_names:
            asked = re.fullmatch(r"(:predict)?(?:@(.*))?", model.removeprefix(name), re.DOTALL)
            if model.startswith(name) and asked is not None:
                session = None if asked[2] is None else session_id(asked[2], "model")
                return "predict" if asked[1] else None, session
        if self.any_model:
            return None, None
        names = " and ".join(map(repr, self.model_names))
        message = f"The model {model[:80]!r} does not exist; this server has {names}."
        raise NotFound(message, param="model", code="model_not_found")


async def get_sessions(request: Request) -> Sessions:
    """Return the sessions of this server."""
    return cast(Sessions, request.app.state.sessions)


async def get_metrics(request: Request) -> Metrics:
    """Return the metrics of this server."""
    return cast(Metrics, request.app.state.metrics)


async def get_rules(request: Request) -> ClientRules:
    """Return how this server reads the requests of its clients."""
    return cast(ClientRules, request.app.state.rules)


async def get_versions(request: Request) -> Versions:
    """Return the operations on the versions of sessions."""
    return Versions(request.app.state.sessions)


async def get_views(request: Request) -> Views:
    """Return the read-only views of sessions."""
    return Views(request.app.state.sessions)


async def get_policies(request: Request) -> PolicyOperations:
    """Return the turns of policies."""
    return PolicyOperations(request.app.state.sessions)


async def get_request_context(request: Request) -> RequestContext:
    """Return the context of the request, and keep the context in `request.state.ctx` for the answer to an error.

    The route class has left the digest of the request in `request.state`.

    Raises:
        BadRequest: the `Idempotency-Key` is empty, too long or not printable.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        raise BadRequest(
            f"'Idempotency-Key' must have 1 to 255 printable ASCII characters, got {key[:80]!r}.",
            param="Idempotency-Key",
        )
    retries = request.headers.get("x-stainless-retry-count", "")  # OpenAI's client counts its attempts here
    ctx = RequestContext(
        request.state.tenant,
        request_id=request.state.request_id,
        digest=request.state.digest,
        key=key,
        attempt=int(retries) if re.fullmatch(r"[0-9]{1,9}", retries) else None,
    )
    request.state.ctx = ctx
    return ctx


def idempotency_headers(ctx: RequestContext | None) -> dict[str, str]:
    """Return the headers that tell a client whether the request was replayed and whether a retry is of use."""
    if ctx is None or not ctx.committed:
        return {}
    return {"x-should-retry": "false"} | ({"Idempotent-Replayed": "true"} if ctx.replayed else {})


def etag(version: int) -> str:
    """Return the `ETag` of a session at a version."""
    return f'"v{version}"'


@dataclass(frozen=True)
class LearningRequest:
    """A request that may update a session: everything that its route needs besides the body.

    Attributes:
        request: the request; its body has been read.
        response: the response to which the route adds headers and a status.
        ctx: the context under which the turn runs and is remembered.
        if_match: the `If-Match` header, or None.
        sessions: the sessions of this server.
        metrics: the metrics of this server.
        rules: how this server reads the requests of its clients.
    """

    request: Request
    response: Response
    ctx: RequestContext
    if_match: str | None
    sessions: Sessions
    metrics: Metrics
    rules: ClientRules

    def set_reply_headers(self, version: int) -> None:
        """Set the `ETag` of the version that the turn led to, and the headers about retries."""
        self.response.headers.update({"ETag": etag(version)} | idempotency_headers(self.ctx))


class LargeReply(Response):
    """A reply that is JSON text already, in pieces; each piece is freed once it is sent.

    Args:
        pieces: the text, the last piece first; sending empties the list.
        response: has the headers that the route has set.
    """

    media_type = "application/json"

    def __init__(self, pieces: list[bytes], response: Response) -> None:
        length = str(sum(map(len, pieces)))
        super().__init__(headers=dict(response.headers) | {"Content-Length": length})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while self._pieces:
            piece = self._pieces.pop()
            await send({"type": "http.response.body", "body": piece, "more_body": bool(self._pieces)})


@dataclass(frozen=True)
class ImprintHeaders:
    """The headers of a completion, for clients that cannot send Imprint's fields. The fields of the body go first."""

    session: str | None = None
    adapt: AdaptMode | None = None


async def get_imprint_headers(session: SessionHeader = None, adapt: AdaptHeader = None) -> ImprintHeaders:
    """Return what the headers of a completion say."""
    return ImprintHeaders(session, adapt)


async def get_learning_request(
    request: Request,
    response: Response,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,  # read by `get_request_context`; declared for /openapi.json
) -> LearningRequest:
    """Return the learning request. Raises BadRequest as `get_request_context` does."""
    ctx = await get_request_context(request)
    parts = request.app.state
    return LearningRequest(request, response, ctx, if_match, parts.sessions, parts.metrics, parts.rules)


SessionsDep = Annotated[Sessions, Depends(get_sessions)]
RulesDep = Annotated[ClientRules, Depends(get_rules)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]
VersionsDep = Annotated[Versions, Depends(get_versions)]
ViewsDep = Annotated[Views, Depends(get_views)]
PoliciesDep = Annotated[PolicyOperations, Depends(get_policies)]
RequestContextDep = Annotated[RequestContext, Depends(get_request_context)]
ImprintHeadersDep = Annotated[ImprintHeaders, Depends(get_imprint_headers)]
LearningRequestDep = Annotated[LearningRequest, Depends(get_learning_request)]
