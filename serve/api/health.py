"""/health and /metrics: open to everybody, for load balancers and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when requests are taken; 503 while loading or draining, and when the engine has died."""
    service = request.app.state.service
    return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")
