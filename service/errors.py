"""The errors a client can meet: one tree, one HTTP status each, OpenAI's body for all of them.

Layers below the routes raise these errors, `service/http/middleware.py` turns each into a response, and the Python
client turns that response into the same error again. Every message is shown to a client: the message names the field,
the limit and the value, and never another session or an internal detail.
"""

from collections.abc import Mapping
from types import MappingProxyType


class CommandError(Exception):
    """A command of the command line cannot be done. The message is one line that says why."""


class ImprintError(Exception):
    """Base of the tree; raise one of its subclasses.

    The Python client adds two things: the `request_id` under which the server's log has the request, and the
    `idempotency_key` of a request that learns, with which it can be sent again.

    Args:
        message: one sentence for the client.
        param: the field of the request at fault, dotted (`messages.0.content`), or None.
        code: a stable word for programs; None keeps the class's own.
        retry_after: seconds after which to try again (sent as `Retry-After`); None keeps the class's own.
    """

    status: int = 500
    type: str = "invalid_request_error"
    code: str | None = None
    retry_after: float | None = None
    headers: Mapping[str, str] = MappingProxyType({})  # of the response, beside `Retry-After`
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
        """The response body, `{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(ImprintError):
    """400: the request can't be honoured as it stands."""

    status = 400


class Unauthorized(ImprintError):
    """401: no API key, or one that is not known."""

    status = 401
    code = "invalid_api_key"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class NotFound(ImprintError):
    """404: no such route, model or session."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ImprintError):
    """405: the route exists, not with this method."""

    status = 405
    code = "method_not_allowed"


class Conflict(ImprintError):
    """409: the session is not in the state that the request needs."""

    status = 409
    code = "conflict"


class VersionConflict(Conflict):
    """409: the session moved on between load and commit."""

    code = "version_conflict"


class PreconditionFailed(ImprintError):
    """412: `If-Match` names another version than the stored one."""

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
    """422: an `Idempotency-Key` came again with another request."""

    status = 422
    code = "idempotency_key_reused"


class TooManyRequests(ImprintError):
    """429: too much is asked for."""

    status = 429
    type = "rate_limit_error"
    retry_after = 1.0


class Overloaded(TooManyRequests):
    """429: the bounded queue is full."""

    code = "queue_full"


class RateLimited(TooManyRequests):
    """429: the tenant has to wait."""

    code = "rate_limit_exceeded"


class QuotaExceeded(TooManyRequests):
    """429: the tenant has used what it may use; waiting alone does not help, so clients are told not to retry."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    retry_after = 60.0
    headers = MappingProxyType({"x-should-retry": "false"})


class Unavailable(ImprintError):
    """503: something this request needs is away for now."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after = 1.0


class StoreUnavailable(Unavailable):
    """503: the session store doesn't answer, or a commit's outcome is unknown."""

    code = "store_unavailable"


class StoreFull(Unavailable):
    """503: the session store has no room; what was learned stays, and can be used."""

    code = "store_full"
    retry_after = 10.0


class SessionBusy(Unavailable):
    """503: another replica teaches the session, or has changed it during the request."""

    code = "session_busy"


class TooLarge(ImprintError):
    """507: the session has, or would get, more rows than it may have or the device can hold."""

    status = 507
    code = "session_too_large"


class NotReady(Unavailable):
    """503: the server is loading (or, with `code="draining"`, going away)."""

    code = "loading"


class EngineError(ImprintError):
    """500: the engine failed on this request."""

    status = 500
    type = "server_error"
    code = "engine_error"
