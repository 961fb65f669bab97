"""The errors that a client can receive: one tree of classes, one HTTP status each, OpenAI's body for all.

The layers below the routes raise these errors, `service/http/middleware.py` turns each into a response, and the Python
client turns the response into the same error again. A client sees every message: the message names the field, the limit
and the value, and never another session or an internal detail.
"""

from collections.abc import Mapping
from types import MappingProxyType


class CommandError(Exception):
    """A command of the command line failed. The message is one line that says why."""


class ImprintError(Exception):
    """The base class of the tree. Code raises its subclasses.

    The Python client sets two attributes: `request_id`, under which the server's log has the request, and
    `idempotency_key`, with which a request that learns can be sent again.

    Args:
        message: one sentence for the client.
        param: the field of the request at fault, dotted (`messages.0.content`), or None.
        code: a stable word for programs; None = the class's own.
        retry_after: seconds after which to try again (sent as `Retry-After`); None = the class's own.
    """

    status: int = 500
    type: str = "invalid_request_error"
    code: str | None = None
    retry_after: float | None = None
    headers: Mapping[str, str] = MappingProxyType({})  # of the response, in addition to `Retry-After`
    request_id: str | None = None
    idempotency_key: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if retry_after is not None:
            self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the response body, `{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(ImprintError):
    """400: the request is not valid."""

    status = 400


class Unauthorized(ImprintError):
    """401: the request has no API key, or an unknown one."""

    status = 401
    code = "invalid_api_key"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class NotFound(ImprintError):
    """404: the route, model or session does not exist."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ImprintError):
    """405: the route does not support this method."""

    status = 405
    code = "method_not_allowed"


class Conflict(ImprintError):
    """409: the session is not in the state that the request needs."""

    status = 409
    code = "conflict"


class VersionConflict(Conflict):
    """409: the session changed between load and commit."""

    code = "version_conflict"


class PreconditionFailed(ImprintError):
    """412: `If-Match` names a version other than the stored one."""

    status = 412
    code = "precondition_failed"


class PayloadTooLarge(ImprintError):
    """413: the body exceeds the configured size."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(ImprintError):
    """415: the body isn't declared as JSON."""

    status = 415
    code = "unsupported_media_type"


class MisdirectedRequest(ImprintError):
    """421: the request calls the server by a name that is not its own."""

    status = 421
    code = "host_not_allowed"


class KeyReused(ImprintError):
    """422: an `Idempotency-Key` was sent before with another request."""

    status = 422
    code = "idempotency_key_reused"


class TooManyRequests(ImprintError):
    """429: the client sends too many requests or tokens."""

    status = 429
    type = "rate_limit_error"
    retry_after = 1.0


class Overloaded(TooManyRequests):
    """429: the bounded queue is full."""

    code = "queue_full"


class RateLimited(TooManyRequests):
    """429: the tenant has exceeded its rate and has to wait."""

    code = "rate_limit_exceeded"


class QuotaExceeded(TooManyRequests):
    """429: the tenant has used up a quota. Waiting alone does not help: `x-should-retry` is `false`."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    retry_after = 60.0
    headers = MappingProxyType({"x-should-retry": "false"})


class Unavailable(ImprintError):
    """503: something that the request needs is temporarily unavailable."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after = 1.0


class StoreUnavailable(Unavailable):
    """503: the session store does not answer, or the outcome of a commit is unknown."""

    code = "store_unavailable"


class ArchiveUnavailable(StoreUnavailable):
    """503: the session is in the archive of idle sessions, and the archive does not answer."""

    code = "archive_unavailable"
    retry_after = 2.0


class StoreFull(Unavailable):
    """503: the session store is full. What was learned before stays and can be used."""

    code = "store_full"
    retry_after = 10.0


class StoreRefused(Unavailable):
    """503: the session store refuses a command, because its user lacks a right or its setup does not fit."""

    code = "store_refused"
    retry_after = 10.0


class SessionBusy(Unavailable):
    """503: another replica teaches the session, or has changed it during the request."""

    code = "session_busy"


class TooLarge(ImprintError):
    """507: the session has, or would get, more rows than its limit or than the device can hold."""

    status = 507
    code = "session_too_large"


class NotReady(Unavailable):
    """503: the server is loading or, with `code="draining"`, shutting down."""

    code = "loading"
    retry_after = 5.0  # a start takes some 10 s, and clients send a request again only a few times


class EngineError(ImprintError):
    """500: the engine failed on this request."""

    status = 500
    type = "server_error"
    code = "engine_error"
