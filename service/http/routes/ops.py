"""Routes for those who run the server: probes and metrics."""

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

from service.http.routes.common import MetricsDep, SessionsDep

RETRY_AFTER_S = 1

router = APIRouter(tags=["Operations"])


class Live(BaseModel):
    """Reply of `GET /livez`."""

    status: Literal["ok"]


class Ready(BaseModel):
    """Reply of `GET /readyz`."""

    status: Literal["loading", "ready", "draining"]


NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "Loading or draining."}}
EXPOSITION: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "imprint_ready_state 1.0\n"}},
        "description": "Prometheus' text exposition.",
    }
}


@router.get("/livez", summary="Is the process alive")
async def livez() -> Live:
    """The process answers."""
    return Live(status="ok")


@router.get("/readyz", summary="Does the server take requests", responses=NOT_READY)
async def readyz(sessions: SessionsDep, response: Response) -> Ready:
    """The server takes requests."""
    if sessions.state != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return Ready(status=sessions.state)


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=EXPOSITION)
async def metrics(request: Request, server_metrics: MetricsDep) -> Response:
    """Prometheus' text exposition; docs/metrics.md lists the names."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(server_metrics.registry), headers={"Content-Type": content_type})
