"""The FastAPI application: routes, keys, and errors in OpenAI's shape."""

from __future__ import annotations

import hmac

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ingot.ops.errors import IngotError

from ..protocol.errors import ApiError
from ..service import Service
from . import chat, completions, embeddings, health, models
from .exchange import as_api_error


def build_app(service: Service) -> FastAPI:
    """The application of one service."""
    app = FastAPI(title="Ingot", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.include_router(health.router)
    for module in (models, completions, chat, embeddings):
        app.include_router(module.router, dependencies=[Depends(_authorize)])
    for kind in (ApiError, IngotError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, _on_error)
    return app


async def _authorize(request: Request) -> None:
    key = request.app.state.service.api_key
    given = request.headers.get("authorization", "").encode("latin-1")
    if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise ApiError(401, "this server needs its API key: Authorization: Bearer KEY", code="invalid_api_key")


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    """Errors of routes, the engine and the router."""
    api_error = as_api_error(error)
    return JSONResponse(api_error.body, api_error.status)
