"""The routes for operators: probes and metrics."""

from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.http.dependencies import MetricsDep, SessionsDep
from service.http.openapi import ERROR_RESPONSES, Responses
from service.http.replies import Health, Live, Ready, Version

RETRY_AFTER_S = 1
NOT_READY: Responses = {503: {"model": Ready, "description": "The server is loading or draining."}}
UNHEALTHY: Responses = {503: {"model": Health, "description": "The server is loading or draining."}}
EXPOSITION: Responses = {
    200: {
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "imprint_ready_state 1.0\n"}},
        "description": "Prometheus' text exposition.",
    }
}

router = APIRouter(responses=ERROR_RESPONSES, tags=["Operations"])


@router.get("/livez", summary="Check that the process is alive")
async def livez() -> Live:
    """Answer as long as the process is alive."""
    return Live(status="ok")


@router.get("/readyz", summary="Check that the server is ready", responses=NOT_READY)
async def readyz(sessions: SessionsDep, response: Response) -> Ready:
    """Report whether the server takes requests; 503 while the server is loading or draining.

    A store that is full or away leaves the server ready: the server answers all requests that need no more.
    """
    if sessions.state != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return Ready(status=sessions.state, store=sessions.store_status)


@router.get("/health", summary="Check that the server is ready", responses=UNHEALTHY)
@router.get("/ping", summary="Check that the server is ready", responses=UNHEALTHY, name="ping")
async def health(sessions: SessionsDep, response: Response) -> Health:
    """Report whether the server takes requests, by the names and in the words of llama.cpp and vLLM."""
    if sessions.state == "ready":
        return Health(status="ok")
    response.status_code = 503
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return Health(status=sessions.state)


@router.get("/version", summary="Read the version of the server")
async def read_version() -> Version:
    """Return the release of Imprint that runs."""
    return Version(version=version("imprint"))


@router.get("/metrics", summary="Read the metrics", response_class=Response, responses=EXPOSITION)
async def metrics(request: Request, server_metrics: MetricsDep) -> Response:
    """Return the metrics in Prometheus' text exposition; docs/metrics.md lists the names."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(server_metrics.registry), headers={"Content-Type": content_type})
