"""Assembling the HTTP edge: the routes, the handlers of errors, the middleware and the description of the API."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service.http.dependencies import ClientRules
from service.http.error_responses import add_error_handlers
from service.http.middleware import (
    PUBLIC_PATHS,
    AuthMiddleware,
    BaseUrlMiddleware,
    BodyMiddleware,
    ErrorMiddleware,
    HostMiddleware,
    MetricsMiddleware,
    RateLimitMiddleware,
    RequestIdMiddleware,
)
from service.http.openapi import describe_api
from service.http.routes import ROUTERS
from service.metrics import Metrics
from service.settings import Settings
from service.tenants import ApiKeys
from service.turns.sessions import Sessions

# Of requests from the pages of other origins, and of the answers that such pages may read.
ALLOWED_HEADERS = ["*"]
EXPOSED_HEADERS = (
    *("ETag", "Idempotent-Replayed", "Retry-After", "X-Imprint-Cut", "X-Imprint-Ignored", "X-Request-Id"),
    "x-should-retry",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)


def install(app: FastAPI, *, sessions: Sessions, metrics: Metrics, settings: Settings, keys: ApiKeys) -> None:
    """Make `app` serve `sessions`."""
    app.state.sessions = sessions
    app.state.metrics = metrics
    app.state.rules = ClientRules(
        model_names=settings.model_names or (sessions.model_id,),
        any_model=settings.any_model,
        strict_fields=settings.strict_fields,
        user_sessions=settings.user_sessions,
    )
    metrics.ready_state.set_function(lambda: sessions.state == "ready")
    app.router.redirect_slashes = False
    for router in ROUTERS:
        app.include_router(router)
    add_error_handlers(app)
    describe_api(app, keys_required=keys.required, public_paths=PUBLIC_PATHS)
    # The middleware that is added last is the outermost.
    app.add_middleware(RateLimitMiddleware, sessions=sessions)
    app.add_middleware(BodyMiddleware, limit=settings.max_body_bytes, total=settings.max_upload_bytes)
    app.add_middleware(AuthMiddleware, keys=keys)
    names = {name.strip().lower() for name in settings.hosts.split(",")} - {""}
    if names or not keys.required:
        app.add_middleware(HostMiddleware, hosts=frozenset(names) or None)
    app.add_middleware(ErrorMiddleware)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["*"],
            allow_headers=ALLOWED_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    app.add_middleware(BaseUrlMiddleware)
    app.add_middleware(RequestIdMiddleware)
